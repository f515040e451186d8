"""How fast the native products are: GB/s of weights and GOP/s per precision and number of rows.

Beside them, in the same run: a plain read of the same memory (what few rows are bound by) and `torch._int_mm` where torch
is installed (what many are). Matrices lie in one large array, more than the caches hold, and are gone through in turn.
Seconds are CPU seconds over threads, the least of a few rounds: a busy machine changes those least.

    python -m benchmarks.serving.kernels --threads 2 --target vnni

Shapes: M rows, N output channels, K input channels.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.table import columns, figure
from raymill.inference import native
from raymill.inference.native import door
from raymill.inference.native.build import TARGETS, Target

PRECISIONS = {"fp32": 0, "int8": 1, "int4": 2}
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)
_MANY_ROWS = 64
_FEW_ROWS_N, _MANY_ROWS_N = 16384, 2048
_WEIGHTS_BYTES = 160 << 20
_ROUNDS = 12


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "columns")),
        *(("values", ctypes.c_void_p), ("values_stride", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("quantized", "scales", "sums")),
        ("group", ctypes.c_int),
    )


@dataclass(frozen=True)
class Speed:
    """One product: what it read and what it computed, per second."""

    gb_per_s: float
    gop_per_s: float


class Kernels:
    """The products of one target with some threads, each with an equal share of the output channels."""

    def __init__(self, target: Target | None, threads: int, K: int) -> None:
        library = native.library(target)
        if library is None:
            raise SystemExit("there is no C++ compiler")
        self._library = door.declare(library)
        library.raymill_matmul_target.restype = ctypes.c_char_p
        for name in ("raymill_row_bytes", "raymill_row_sums"):
            getattr(library, name).restype = ctypes.c_int64
        self.target: str = library.raymill_matmul_target().decode()
        self._threads, self._K = threads, K
        self._pool = ThreadPoolExecutor(threads)
        self._rng = np.random.default_rng(0)

    def together(self, work: Callable[[int], object]) -> float:
        """CPU seconds of work(thread) per thread, all at once; the least of some rounds."""

        def timed(thread: int) -> float:
            began = time.thread_time()
            work(thread)
            return time.thread_time() - began

        return min(sum(self._pool.map(timed, range(self._threads))) for _ in range(_ROUNDS)) / self._threads

    def read(self) -> float:
        """GB/s of a plain read."""
        words = np.ones(_WEIGHTS_BYTES // 8, np.uint64)
        parts = np.array_split(words, self._threads)
        return words.nbytes / self.together(lambda thread: np.bitwise_or.reduce(parts[thread])) / 1e9

    def product(self, precision: int, M: int, group: int) -> Speed:
        N, K = _MANY_ROWS_N if M >= _MANY_ROWS else _FEW_ROWS_N, self._K
        group = group if precision == PRECISIONS["int4"] else 0
        matrices, size = self._matrices(precision, N, group)
        x, kept = self._rows(M, group)
        y_MN = np.empty((M, N), np.float32)
        blocks = [N // 16 * thread // self._threads for thread in range(self._threads + 1)]
        at, stride = ctypes.c_void_p(y_MN.ctypes.data), ctypes.c_int64(N)

        def work(thread: int) -> None:
            for matrix in matrices:
                self._library.raymill_matmul(
                    ctypes.byref(matrix), ctypes.byref(x), at, stride, blocks[thread], blocks[thread + 1], 0
                )

        seconds = self.together(work) / len(matrices)
        del kept
        return Speed(size / seconds / 1e9, 2 * M * N * K / seconds / 1e9)

    def _matrices(self, precision: int, N: int, group: int) -> tuple[list[Any], int]:
        K = self._K
        size = self._library.raymill_packed_bytes(precision, N, K, group)
        count = max(2, _WEIGHTS_BYTES // size if N == _FEW_ROWS_N else 8)
        self._packed = np.empty(count * size + 64, np.uint8)  # above 4 MiB numpy asks for huge pages
        start = -(-self._packed.ctypes.data // 64) * 64
        weights: NDArray[Any] = self._rng.integers(0, 255, (N, K), np.uint8)
        if precision == PRECISIONS["fp32"]:
            weights = weights.astype(np.float32)
        scales = np.ones((N, K // group if group else 1), np.float16 if group else np.float32)
        matrices = []
        for place in range(start, start + count * size, size):
            self._library.raymill_pack(precision, weights.ctypes.data, scales.ctypes.data, N, K, group, place)
            matrices.append(door.Matrix(precision, N, K, group, place, None))
        return matrices, size

    def _rows(self, M: int, group: int) -> tuple[_Rows, tuple[NDArray[Any], ...]]:
        x_MK = self._rng.standard_normal((M, self._K), np.float32)
        quantized = np.empty((M, self._library.raymill_row_bytes(self._K)), np.int8)
        scales_M = np.empty(M, np.float32)
        sums = np.empty((M, self._library.raymill_row_sums(self._K, group)), np.int32)
        kept = (x_MK, quantized, scales_M, sums)
        places = [ctypes.c_void_p(array.ctypes.data) for array in kept]
        self._library.raymill_quantize_rows(places[0], M, self._K, group, *places[1:])
        return _Rows(M, self._K, places[0], self._K, *places[1:], group), kept


def torch_gop_per_s(M: int, K: int, threads: int) -> float | None:
    """`torch._int_mm` of the same shape, its weights in the cache; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    N = _MANY_ROWS_N if M >= _MANY_ROWS else _FEW_ROWS_N
    x_MK = torch.randint(-127, 128, (M, K), dtype=torch.int8)
    weights_KN = torch.randint(-127, 128, (N, K), dtype=torch.int8).t()
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.process_time()
        torch._int_mm(x_MK, weights_KN)
        best = min(best, time.process_time() - began)
    return 2 * M * N * K * threads / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="by default the best this CPU runs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--columns", type=int, default=768, help="K (default: %(default)s)")
    parser.add_argument("--group", type=int, default=32, help="of int4 (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    options = parser.parse_args()
    kernels = Kernels(options.target, options.threads, options.columns)
    print(
        f"target {kernels.target}, {options.threads} threads, K {options.columns}; plain read {kernels.read():.1f} GB/s"
    )
    cells = [["rows", *(f"{name} {unit}" for name in PRECISIONS for unit in ("GB/s", "GOP/s")), "torch._int_mm GOP/s"]]
    for M in options.rows:
        speeds = [kernels.product(precision, M, options.group) for precision in PRECISIONS.values()]
        found = [value for speed in speeds for value in (speed.gb_per_s, speed.gop_per_s)]
        cells.append(
            [str(M), *(figure(value) for value in (*found, torch_gop_per_s(M, options.columns, options.threads)))]
        )
    print(columns(cells))


if __name__ == "__main__":
    main()
