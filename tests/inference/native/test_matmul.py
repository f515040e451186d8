"""The products of the native engine against exact integers and float64, for every target that this CPU runs.

Shapes: M rows, N output channels, K input channels, G group size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from raymill.inference import native
from raymill.inference.native.build import runnable_targets

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

    def __init__(self, target: str, weights: Weights, bias_N: Floats | None = None) -> None:
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
        self._library.raymill_quantize_rows(
            _at(x_MK), len(x_MK), self.K, group, _at(rows), _at(scales_M), _at(sums)
        )
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
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            self._library.raymill_matmul(
                ctypes.byref(self._matrix), ctypes.byref(x), _at(y), ctypes.c_int64(self.N + spare), first, last,
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
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SHAPES = [(F32, 37, 45, 0), (F32, 128, 64, 0), (I8, 37, 45, 0), (I8, 1, 1, 0), (I8, 100, 770, 0), (I8, 64, 256, 0)]
SHAPES += [(I4, 37, 96, 32), (I4, 64, 128, 32), (I4, 19, 192, 64), (I4, 80, 48, 16), (I4, 33, 40, 8)]


@pytest.mark.parametrize(("precision", "N", "K", "group"), SHAPES)
def test_products_are_what_the_integers_say(target: str, precision: int, N: int, K: int, group: int) -> None:
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
