"""The products of the native engine against exact integers and float64, for every target that this CPU runs.

Shapes: M rows, N output channels, K input channels, G group size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from raymill.inference import native
from raymill.inference.native.build import Target, runnable_targets

F32, I8, I4 = 0, 1, 2
Floats = npt.NDArray[np.float32]


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("precision", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("group", ctypes.c_int),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class CRows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("values", ctypes.c_void_p),
        ("values_stride", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("group", ctypes.c_int),
    )


@dataclass(frozen=True)
class Weights:
    """A matrix as a checkpoint has it: integers (or floats), and scales (N, K/G)."""

    precision: int
    values_NK: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic] | None = None
    group: int = 0

    @property
    def stored(self) -> npt.NDArray[np.generic]:
        if self.precision != I4:
            return self.values_NK
        shifted_NK = (self.values_NK + 8).astype(np.uint8)
        return np.ascontiguousarray(shifted_NK[:, 0::2] | shifted_NK[:, 1::2] << 4)

    def as_float(self) -> Floats:
        if self.scales is None:
            return self.values_NK.astype(np.float32)
        scales = self.scales.astype(np.float32)
        return self.values_NK.astype(np.float32) * np.repeat(scales, self.values_NK.shape[1] // scales.shape[1], axis=1)


class Product:
    """A packed matrix in one target's library."""

    def __init__(self, target: Target, weights: Weights, bias_N: Floats | None = None) -> None:
        library = native.library(target)
        assert library is not None
        for name in ("raymill_packed_bytes", "raymill_row_bytes", "raymill_row_sums"):
            getattr(library, name).restype = ctypes.c_int64
        library.raymill_matmul_target.restype = ctypes.c_char_p
        assert library.raymill_matmul_target().decode() == target
        self._library, self._weights = library, weights
        self.N, self.K = weights.values_NK.shape
        shape = (weights.precision, self.N, self.K, weights.group)
        self._packed = _aligned(library.raymill_packed_bytes(*shape))
        stored, scales = np.ascontiguousarray(weights.stored), weights.scales
        library.raymill_pack(
            weights.precision, _at(stored), _at(scales), self.N, self.K, weights.group, _at(self._packed)
        )
        self._bias_N = bias_N
        self._matrix = CMatrix(*shape, self._packed.ctypes.data, None if bias_N is None else bias_N.ctypes.data)

    def quantized(self, x_MK: Floats) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]:
        group = self._weights.group
        rows = np.full((len(x_MK), self._library.raymill_row_bytes(self.K)), 99, np.int8)
        scales_M = np.empty(len(x_MK), np.float32)
        sums = np.empty((len(x_MK), self._library.raymill_row_sums(self.K, group)), np.int32)
        self._library.raymill_quantize_rows(_at(x_MK), len(x_MK), self.K, group, _at(rows), _at(scales_M), _at(sums))
        return rows, scales_M, sums

    def __call__(
        self, x_MK: Floats, blocks: tuple[int, ...] = (), onto: Floats | None = None, spare: int = 3
    ) -> Floats:
        """y (M, N). `blocks`: where to cut the call in several. Columns beside y must stay as they are."""
        M = len(x_MK)
        rows, scales_M, sums = self.quantized(x_MK)
        x = CRows(
            *(M, self.K, x_MK.ctypes.data, self.K),
            *(rows.ctypes.data, scales_M.ctypes.data, sums.ctypes.data, self._weights.group),
        )
        y = np.full((M, self.N + spare), 7.25, np.float32)
        if onto is not None:
            y[:, : self.N] = onto
        cuts = (0, *blocks, -(-self.N // 16))
        for first, last in pairwise(cuts):
            self._library.raymill_matmul(
                ctypes.byref(self._matrix),
                ctypes.byref(x),
                _at(y),
                ctypes.c_int64(self.N + spare),
                first,
                last,
                int(onto is not None),
            )
        assert (y[:, self.N :] == 7.25).all()
        return y[:, : self.N].copy()

    def row(self, n: int) -> Floats:
        out_K = np.empty(self.K, np.float32)
        self._library.raymill_read_row(ctypes.byref(self._matrix), n, _at(out_K))
        return out_K


def _at(array: npt.NDArray[np.generic] | None) -> ctypes.c_void_p:
    assert array is None or array.flags.c_contiguous
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    room = np.full(size + 64, 0xAA, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def quantize(x_MK: Floats) -> tuple[npt.NDArray[np.float64], Floats]:
    """What compression.quantize.quantize_rows does, in numpy."""
    scale_M1 = np.maximum(np.abs(x_MK).max(axis=1, keepdims=True) / np.float32(127.0), np.float32(1e-12))
    return np.rint(x_MK / scale_M1).astype(np.float64), scale_M1


def expected(weights: Weights, x_MK: Floats, bias_N: Floats | None = None) -> Floats:
    """Every rounding as the products promise it (int8, int4); float64 for fp32."""
    if weights.precision == F32:
        y_MN = (x_MK.astype(np.float64) @ weights.values_NK.T.astype(np.float64)).astype(np.float32)
    else:
        values_MK, scale_M1 = quantize(x_MK)
        assert weights.scales is not None
        K = x_MK.shape[1]
        group = weights.group or K
        y_MN = np.zeros((len(x_MK), len(weights.values_NK)), np.float32)
        for g in range(K // group):
            part = slice(g * group, (g + 1) * group)
            sums_MN = values_MK[:, part] @ weights.values_NK[:, part].T.astype(np.float64)  # exact: far below 2 ** 53
            y_MN = y_MN + sums_MN.astype(np.float32) * weights.scales[:, g].astype(np.float32)
        y_MN = y_MN * scale_M1
    return y_MN if bias_N is None else y_MN + bias_N


def random_weights(precision: int, N: int, K: int, group: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    if precision == F32:
        return Weights(F32, rng.standard_normal((N, K), np.float32))
    if precision == I8:
        scales = rng.uniform(1e-3, 1e-1, (N, 1)).astype(np.float32)
        return Weights(I8, rng.integers(-127, 128, (N, K), dtype=np.int8), scales)
    scales = rng.uniform(1e-3, 1e-1, (N, K // group)).astype(np.float16)
    return Weights(I4, rng.integers(-8, 8, (N, K), dtype=np.int8), scales, group)


@pytest.fixture(params=runnable_targets())
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


SHAPES = [(F32, 37, 45, 0), (F32, 128, 64, 0), (I8, 37, 45, 0), (I8, 1, 1, 0), (I8, 100, 770, 0), (I8, 64, 256, 0)]
SHAPES += [(I4, 37, 96, 32), (I4, 64, 128, 32), (I4, 19, 192, 64), (I4, 80, 48, 16), (I4, 33, 40, 8)]


@pytest.mark.parametrize(("precision", "N", "K", "group"), SHAPES)
def test_products_are_what_the_integers_say(target: Target, precision: int, N: int, K: int, group: int) -> None:
    weights = random_weights(precision, N, K, group)
    rng = np.random.default_rng(1)
    bias_N = rng.standard_normal(N, np.float32)
    product = Product(target, weights, bias_N)
    for M in (*range(1, 34), 64, 200):
        x_MK = rng.standard_normal((M, K), np.float32)
        if precision == F32:
            np.testing.assert_allclose(product(x_MK), expected(weights, x_MK, bias_N), rtol=1e-5, atol=1e-4)
        else:
            np.testing.assert_array_equal(product(x_MK), expected(weights, x_MK, bias_N))


@pytest.mark.parametrize(("precision", "K", "group"), [(F32, 150, 0), (I8, 150, 0), (I4, 192, 32), (I4, 48, 8)])
def test_a_row_has_the_same_bits_whatever_the_other_rows_and_the_cuts(
    target: Target, precision: int, K: int, group: int
) -> None:
    N = 16 * 9 + 5
    product = Product(target, random_weights(precision, N, K, group))
    x_MK = np.random.default_rng(2).standard_normal((70, K), np.float32)
    alone = np.concatenate([product(x_MK[m : m + 1]) for m in range(len(x_MK))])
    for M in (*range(2, 30), 47, 70):
        np.testing.assert_array_equal(product(x_MK[:M]), alone[:M])
    for cuts in ((1,), (4, 5), (3, 6, 9), tuple(range(1, 10))):
        for M in (1, 3, 8, 12, 31):
            np.testing.assert_array_equal(product(x_MK[:M], blocks=cuts), alone[:M])


@pytest.mark.parametrize(("precision", "K", "group"), [(F32, 64, 0), (I8, 70, 0), (I4, 64, 32)])
def test_a_product_with_a_bias_goes_onto_what_is_there(target: Target, precision: int, K: int, group: int) -> None:
    rng = np.random.default_rng(3)
    weights, bias_N = random_weights(precision, 53, K, group), rng.standard_normal(53, np.float32)
    x_MK, onto = rng.standard_normal((13, K), np.float32), rng.standard_normal((13, 53), np.float32)
    plain, biased = Product(target, weights)(x_MK), Product(target, weights, bias_N)(x_MK)
    np.testing.assert_array_equal(biased, plain + bias_N)
    np.testing.assert_array_equal(Product(target, weights, bias_N)(x_MK, onto=onto), onto + biased)


@pytest.mark.parametrize("K", [4096, 4100])
def test_the_largest_int8_sums_are_exact(target: Target, K: int) -> None:
    values_NK = np.full((40, K), 127, np.int8)
    values_NK[1::3] = -127
    values_NK[2::3] = -128  # not ours, but a checkpoint of others may carry it
    weights = Weights(I8, values_NK, np.full((40, 1), 0.5, np.float32))
    x_MK = np.ones((5, K), np.float32)
    x_MK[1] = -1.0
    x_MK[2, ::2] = -1.0
    x_MK[3] = 0.0
    x_MK[4, 7] = 1e6  # an outlier: everything else rounds to 0
    np.testing.assert_array_equal(Product(target, weights)(x_MK), expected(weights, x_MK))


@pytest.mark.parametrize("group", [8, 32, 128])
@pytest.mark.parametrize("value", [-8, 0, 7])
def test_the_largest_int4_sums_are_exact(target: Target, value: int, group: int) -> None:
    scales = np.random.default_rng(4).uniform(1e-3, 1e-1, (24, 1024 // group)).astype(np.float16)
    weights = Weights(I4, np.full((24, 1024), value, np.int8), scales, group)
    x_MK = np.ones((5, 1024), np.float32)
    x_MK[1] = -1.0
    x_MK[2, 1::2] = -1.0
    x_MK[3] = 0.0
    np.testing.assert_array_equal(Product(target, weights)(x_MK), expected(weights, x_MK))


@pytest.mark.parametrize("K", [1, 15, 64, 771])
def test_rows_become_the_integers_of_the_torch_step(target: Target, K: int) -> None:
    torch = pytest.importorskip("torch")
    quantize_rows = pytest.importorskip("raymill.compression.quantize").quantize_rows
    rng = np.random.default_rng(5)
    x_MK = (rng.standard_normal((40, K)) * 10.0 ** rng.integers(-20, 20, (40, 1))).astype(np.float32)
    x_MK[0] = 0.0
    x_MK[1] = np.arange(K) + 0.5  # ties
    x_MK[1, 0] = 127.0
    rows, scales_M, sums = Product(target, random_weights(I8, 16, K, 0)).quantized(x_MK)
    theirs_MK, their_scales_M1 = quantize_rows(torch.from_numpy(x_MK))
    np.testing.assert_array_equal(rows[:, :K], theirs_MK.numpy())
    np.testing.assert_array_equal(scales_M, their_scales_M1.numpy()[:, 0])
    assert not rows[:, K:].any()
    np.testing.assert_array_equal(sums[:, 0], -128 * rows.astype(np.int32).sum(axis=1))


def test_a_row_with_nan_is_nan_and_leaves_the_others_alone(target: Target) -> None:
    product = Product(target, random_weights(I8, 20, 40, 0))
    x_MK = np.random.default_rng(6).standard_normal((3, 40), np.float32)
    clean = product(x_MK)
    x_MK[1, 5] = np.nan
    y_MN = product(x_MK)
    assert np.isnan(y_MN[1]).all()
    np.testing.assert_array_equal(y_MN[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(("precision", "K", "group"), [(F32, 45, 0), (I8, 45, 0), (I4, 96, 32)])
def test_a_row_of_the_matrix_reads_back(target: Target, precision: int, K: int, group: int) -> None:
    weights = random_weights(precision, 35, K, group)
    product = Product(target, weights)
    for n in (0, 15, 16, 34):
        np.testing.assert_array_equal(product.row(n), weights.as_float()[n])


def test_every_fp16_scale_is_read_as_numpy_reads_it(target: Target) -> None:
    scales = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    scales = np.where(np.isfinite(scales), scales, np.float16(0.0))
    weights = Weights(I4, np.ones((64, 8 * 1024), np.int8), scales, 8)
    product = Product(target, weights)
    for n in range(64):
        np.testing.assert_array_equal(product.row(n), weights.as_float()[n])
    x_MK = np.zeros((1, 8 * 1024), np.float32)
    for k in (0, 8, 8 * 511, 8 * 1023):
        x_MK[:] = 0.0
        x_MK[0, k] = 127.0
        np.testing.assert_array_equal(product(x_MK), expected(weights, x_MK))
