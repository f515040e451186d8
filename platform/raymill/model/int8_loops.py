"""Compiled loops between fp32 and int8 for model/int8.py: find the largest number, round and pack, without copies.

A scale is the largest absolute number of a row or column over 127. NaN and infinities make their row's or column's scale
NaN, so that they are seen in the product. Shapes: N rows, D width, O outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.int8]]
Sums = np.ndarray[Any, np.dtype[np.int32]]
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_MOST = np.float32(127.0)
_HALF = np.float32(0.5)
_TINY = np.float32(1e-30)
_BAD = np.float32(np.nan)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def quantize_rows(x_ND: Array, q_ND: Bytes, scales_N: Array) -> None:
    bits_ND = x_ND.view(np.int32)
    for i in range(x_ND.shape[0]):
        largest = np.int32(0)
        for j in range(x_ND.shape[1]):  # of positive floats, and of no others, the larger one has the larger bits
            largest = max(largest, np.int32(bits_ND[i, j] & np.int32(0x7FFFFFFF)))
        scale, inverse = _scale(largest)
        scales_N[i] = scale
        for j in range(x_ND.shape[1]):
            q_ND[i, j] = np.int8(np.floor(x_ND[i, j] * inverse + _HALF))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def quantize_columns(x_ND: Array, q_ND: Bytes, scales_D: Array) -> None:
    width = x_ND.shape[1]
    bits_ND = x_ND.view(np.int32)
    largest_D, inverses_D = np.zeros(width, np.int32), np.empty(width, np.float32)
    for i in range(x_ND.shape[0]):
        for j in range(width):
            largest_D[j] = max(largest_D[j], np.int32(bits_ND[i, j] & np.int32(0x7FFFFFFF)))
    for j in range(width):
        scales_D[j], inverses_D[j] = _scale(largest_D[j])
    for i in range(x_ND.shape[0]):
        for j in range(width):
            q_ND[i, j] = np.int8(np.floor(x_ND[i, j] * inverses_D[j] + _HALF))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def scale_sums(sums_NO: Sums, rows_N: Array, columns_O: Array, bias_O: Array, y_NO: Array) -> None:
    """y = sums x the scales of its row and column, plus bias."""
    for i in range(sums_NO.shape[0]):
        row = rows_N[i]
        for j in range(sums_NO.shape[1]):
            y_NO[i, j] = np.float32(sums_NO[i, j]) * row * columns_O[j] + bias_O[j]


@njit(cache=True, error_model="numpy")
def _scale(bits: Any) -> Any:
    """Scale and its inverse, of the largest absolute number's bits."""
    if bits >= np.int32(0x7F800000):
        return _BAD, np.float32(0.0)
    scale = np.array([bits], np.int32).view(np.float32)[0] / _MOST
    return scale, np.float32(1.0) / max(scale, _TINY)
