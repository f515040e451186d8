"""Compiled loops over fp32 rows on CPUs, for model/kernels.py, model/attention.py and training/losses.py.

Each reads a row while it is in cache and writes what follows, where a chain of torch operations goes through memory once
for each. Rows are independent of each other, so that any split of them over threads gives the same bits; sums within a row
are made in lanes whose order depends on its length alone. NaN goes through, so that a broken step is seen.

All loops stand in one file because numba's cache on disk looks at the time stamp of the calling file only.
Shapes: N rows, D width of a row, H heads, C head_width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray[Any, np.dtype[np.float32]]
Places = np.ndarray[Any, np.dtype[np.int64]]
_SUMS = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler may do: sum in lanes and fuse multiply and add, but keep NaN and infinities."""
PART_ROWS = 256
"""Rows whose share of a weight's gradient is summed by itself."""
_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_GELU_ROOT = np.float32(0.7978845608028654)  # sqrt(2 / pi)
_GELU_CUBE = np.float32(0.044715)


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 ** exponent for whole float32 in [-126, 127], by its bits: vectorizes, where ldexp does not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = ir.IntType(32)
        shifted = builder.add(builder.fptosi(arguments[0], bits), ir.Constant(bits, 127))
        return builder.bitcast(builder.shl(shifted, ir.Constant(bits, 23)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _larger(typing_context: Any, a: Any, b: Any) -> Any:
    """max of two float32 that are no NaN, marked so: unmarked, as max gives it, the largest of a row takes 8 times as long."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=flags), *arguments, flags=flags)

    return types.float32(types.float32, types.float32), generate


@njit(cache=True, error_model="numpy", fastmath=_SUMS)
def _exp(x: Any) -> Any:
    """e ** x within 2e-7 of itself for x of [-87, 88], and NaN for NaN; below, about 1e-38."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    whole = np.floor(x * _LOG2_E + _HALF)
    r = x - whole * _LN_2
    p = np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + _HALF
    p = p * r + _ONE
    p = p * r + _ONE
    return p * _power_of_two(whole)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def _largest(row: Array) -> Any:
    """The largest of a row; not a NaN, which what follows finds for itself."""
    largest = row[0]
    for j in range(row.shape[0]):
        largest = _larger(row[j], largest)
    return largest


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def rms_norm(x_ND: Array, weight_D: Array, eps: float, roots_N: Array, y_ND: Array) -> None:
    """y = x / root mean square * weight; roots_N keeps 1 / root mean square."""
    width = x_ND.shape[1]
    for i in range(x_ND.shape[0]):
        squares = _ZERO
        for j in range(width):
            squares += x_ND[i, j] * x_ND[i, j]
        root = np.float32(_ONE / np.sqrt(squares / np.float32(width) + np.float32(eps)))
        roots_N[i] = root
        for j in range(width):
            y_ND[i, j] = x_ND[i, j] * root * weight_D[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def add_rms_norm(
    a_ND: Array, b_ND: Array, weight_D: Array, eps: float, x_ND: Array, roots_N: Array, y_ND: Array
) -> None:
    """x = a + b, and its rms_norm."""
    width = a_ND.shape[1]
    for i in range(a_ND.shape[0]):
        squares = _ZERO
        for j in range(width):
            x = a_ND[i, j] + b_ND[i, j]
            x_ND[i, j] = x
            squares += x * x
        root = np.float32(_ONE / np.sqrt(squares / np.float32(width) + np.float32(eps)))
        roots_N[i] = root
        for j in range(width):
            y_ND[i, j] = x_ND[i, j] * root * weight_D[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def rms_norm_backward(
    dy_ND: Array,
    x_ND: Array,
    weight_D: Array,
    roots_N: Array,
    dsum_ND: Array,
    summed: bool,
    dx_ND: Array,
    dweight_PD: Array,
) -> None:
    """dx of rms_norm, plus dsum where x was summed; a row of dweight for each PART_ROWS rows."""
    width = x_ND.shape[1]
    dweight_PD[:] = _ZERO
    for i in range(x_ND.shape[0]):
        root = roots_N[i]
        part = i // PART_ROWS
        dot = _ZERO
        for j in range(width):
            dot += dy_ND[i, j] * weight_D[j] * x_ND[i, j]
            dweight_PD[part, j] += dy_ND[i, j] * x_ND[i, j] * root
        along = dot * root * root * root / np.float32(width)
        if summed:
            for j in range(width):
                dx_ND[i, j] = dy_ND[i, j] * weight_D[j] * root - x_ND[i, j] * along + dsum_ND[i, j]
        else:
            for j in range(width):
                dx_ND[i, j] = dy_ND[i, j] * weight_D[j] * root - x_ND[i, j] * along


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def swiglu(gate_N: Array, up_N: Array, y_N: Array) -> None:
    for i in range(gate_N.shape[0]):
        y_N[i] = gate_N[i] * up_N[i] / (_ONE + _exp(-gate_N[i]))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def swiglu_backward(dy_N: Array, gate_N: Array, up_N: Array, dgate_N: Array, dup_N: Array) -> None:
    """dgate may be dy."""
    for i in range(gate_N.shape[0]):
        gate, dy = gate_N[i], dy_N[i]
        share = _ONE / (_ONE + _exp(-gate))
        dup_N[i] = dy * gate * share
        dgate_N[i] = dy * up_N[i] * share * (_ONE + gate * (_ONE - share))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def gelu(x_N: Array, y_N: Array) -> None:
    """x / (1 + e ** -2z), z = sqrt(2 / pi) (x + 0.044715 x ** 3): x (1 + tanh z) / 2."""
    for i in range(x_N.shape[0]):
        x = x_N[i]
        z = _GELU_ROOT * (x + _GELU_CUBE * x * x * x)
        y_N[i] = x / (_ONE + _exp(np.float32(-2.0) * z))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def gelu_backward(dy_N: Array, x_N: Array, dx_N: Array) -> None:
    for i in range(x_N.shape[0]):
        x = x_N[i]
        z = _GELU_ROOT * (x + _GELU_CUBE * x * x * x)
        slope = np.float32(2.0) * _GELU_ROOT * (_ONE + np.float32(3.0) * _GELU_CUBE * x * x)
        share = _ONE / (_ONE + _exp(np.float32(-2.0) * z))
        dx_N[i] = dy_N[i] * share * (_ONE + x * slope * (_ONE - share))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def rotate(
    x_BTHC: Array,
    cos_TC: Array,
    sin_TC: Array,
    weight_C: Array,
    eps: float,
    normed: bool,
    roots_BTH: Array,
    y_BHTC: Array,
) -> None:
    """Each head's rms_norm where normed, then its halves turned by the angle of its position."""
    batch, length, heads, width = x_BTHC.shape
    half = width // 2
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                if normed:
                    squares = _ZERO
                    for c in range(width):
                        squares += x_BTHC[b, t, h, c] * x_BTHC[b, t, h, c]
                    root = np.float32(_ONE / np.sqrt(squares / np.float32(width) + np.float32(eps)))
                    roots_BTH[b, t, h] = root
                    for c in range(half):
                        first = x_BTHC[b, t, h, c] * root * weight_C[c]
                        second = x_BTHC[b, t, h, c + half] * root * weight_C[c + half]
                        y_BHTC[b, h, t, c] = first * cos_TC[t, c] - second * sin_TC[t, c]
                        y_BHTC[b, h, t, c + half] = second * cos_TC[t, c] + first * sin_TC[t, c]
                else:
                    for c in range(half):
                        first, second = x_BTHC[b, t, h, c], x_BTHC[b, t, h, c + half]
                        y_BHTC[b, h, t, c] = first * cos_TC[t, c] - second * sin_TC[t, c]
                        y_BHTC[b, h, t, c + half] = second * cos_TC[t, c] + first * sin_TC[t, c]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def rotate_backward(
    dy_BHTC: Array,
    x_BTHC: Array,
    cos_TC: Array,
    sin_TC: Array,
    weight_C: Array,
    normed: bool,
    roots_BTH: Array,
    dx_BTHC: Array,
    dweight_BC: Array,
) -> None:
    """The turn back, then the gradient of the norm, a row of dweight for each sequence."""
    batch, length, heads, width = dx_BTHC.shape
    half = width // 2
    turned = np.empty(width, np.float32)
    dweight_BC[:] = _ZERO
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                for c in range(half):
                    first, second = dy_BHTC[b, h, t, c], dy_BHTC[b, h, t, c + half]
                    turned[c] = first * cos_TC[t, c] + second * sin_TC[t, c]
                    turned[c + half] = second * cos_TC[t, c] - first * sin_TC[t, c]
                if normed:
                    root = roots_BTH[b, t, h]
                    dot = _ZERO
                    for c in range(width):
                        dot += turned[c] * weight_C[c] * x_BTHC[b, t, h, c]
                        dweight_BC[b, c] += turned[c] * x_BTHC[b, t, h, c] * root
                    along = dot * root * root * root / np.float32(width)
                    for c in range(width):
                        dx_BTHC[b, t, h, c] = turned[c] * weight_C[c] * root - x_BTHC[b, t, h, c] * along
                else:
                    for c in range(width):
                        dx_BTHC[b, t, h, c] = turned[c]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def softmax(
    scores_NRS: Array, first_BT: Places, query: int, start: int, heads: int, group: int, scale: float, logs_NR: Array
) -> None:
    """Scores become probabilities in place; logs_NR keeps the log of each row's sum.

    Row r of matrix n is query `query + r // group` of sequence n // heads, which sees the keys from first_BT to itself;
    scores begin at key `start`.
    """
    matrices, rows, _ = scores_NRS.shape
    factor = np.float32(scale)
    for n in range(matrices):
        for r in range(rows):
            at = query + r // group
            first, last = max(first_BT[n // heads, at] - start, 0), at - start + 1
            row = scores_NRS[n, r, first:last]
            largest = _largest(row) * factor
            total = _ZERO
            for j in range(row.shape[0]):
                p = _exp(row[j] * factor - largest)
                row[j] = p
                total += p
            logs_NR[n, r] = largest + np.log(total)
            share = _ONE / total
            for j in range(row.shape[0]):
                row[j] *= share
            scores_NRS[n, r, :first] = _ZERO
            scores_NRS[n, r, last:] = _ZERO


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def softmax_again(
    scores_NRS: Array, first_BT: Places, query: int, start: int, heads: int, group: int, scale: float, logs_NR: Array
) -> None:
    """softmax's probabilities from the same scores and the logs it kept."""
    matrices, rows, _ = scores_NRS.shape
    factor = np.float32(scale)
    for n in range(matrices):
        for r in range(rows):
            at = query + r // group
            first, last = max(first_BT[n // heads, at] - start, 0), at - start + 1
            row = scores_NRS[n, r, first:last]
            log = logs_NR[n, r]
            for j in range(row.shape[0]):
                row[j] = _exp(row[j] * factor - log)
            scores_NRS[n, r, :first] = _ZERO
            scores_NRS[n, r, last:] = _ZERO


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def softmax_backward(p_NRS: Array, dp_NRS: Array, scale: float) -> None:
    """The gradient of the scores, written over that of the probabilities."""
    factor = np.float32(scale)
    for n in range(p_NRS.shape[0]):
        for r in range(p_NRS.shape[1]):
            p, dp = p_NRS[n, r], dp_NRS[n, r]
            dot = _ZERO
            for j in range(p.shape[0]):
                dot += p[j] * dp[j]
            for j in range(p.shape[0]):
                dp[j] = p[j] * (dp[j] - dot) * factor


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def cross_entropy(logits_NV: Array, targets_N: Places, differentiated: bool, losses_N: Array) -> None:
    """The loss in nats of each row; where differentiated, its gradient is written over the logits."""
    vocab = logits_NV.shape[1]
    for i in range(logits_NV.shape[0]):
        row = logits_NV[i]
        largest = _largest(row)
        chosen = row[targets_N[i]]
        total = _ZERO
        if differentiated:
            for j in range(vocab):
                p = _exp(row[j] - largest)
                row[j] = p
                total += p
            share = _ONE / total
            for j in range(vocab):
                row[j] *= share
            row[targets_N[i]] -= _ONE
        else:
            for j in range(vocab):
                total += _exp(row[j] - largest)
        losses_N[i] = np.log(total) + largest - chosen
