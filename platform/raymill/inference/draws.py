"""The arithmetic of choosing a token, in numpy: what runs where there is no compiler, and what native/sample.cpp must equal.

Every operation that decides a token is written in the order in which the compiled code does it: elementwise in fp64
without fused steps, then sums of integers. A drawn row costs about 1 ms at vocabulary 32,000 (compiled: some 40 us).

Shapes: V vocab_size, K ids that are changed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from raymill.inference.step import Floats

Ids = NDArray[np.int64]
Weights = NDArray[np.int64]

UNIT_BITS = 43
"""The likeliest token weighs 2**43: sums of up to 2**20 tokens fit, and what cannot be drawn is below 1e-13 of it."""
_NEAREST = 1.5 * 2.0**52  # added to a double below 2**51, it leaves the nearest integer in the low bits
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.6931471803691238  # 33 bits: times an integer below 2**20 it is exact
_LN2_LOW = 1.9082149292705877e-10
_LOWEST = -40.0  # exp(-40) * 2**43 rounds to 0
_SERIES = [1.0 / math.factorial(power) for power in range(9, -1, -1)]
"""exp(r) by its Taylor series; for r within ln(2) / 2 the rest is below 1e-11."""


def weigh(logits_V: Floats, temperature: float) -> Weights:
    """round(2**43 * exp((logit - largest) / temperature)) of each token."""
    inverse = min(1.0 / temperature, 1e300)
    wide_V = logits_V.astype(np.float64)
    scaled_V = np.maximum((wide_V - wide_V.max()) * inverse, _LOWEST)
    shifted_V = scaled_V * _LOG2_E + _NEAREST
    powers_V = shifted_V - _NEAREST
    rest_V = (scaled_V - powers_V * _LN2_HIGH) - powers_V * _LN2_LOW
    series_V = np.full_like(rest_V, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series_V = series_V * rest_V + coefficient
    exponents_V = powers_V.astype(np.int64) + (1023 + UNIT_BITS)
    return np.rint(series_V * (exponents_V << 52).view(np.float64)).astype(np.int64)


def draw(weights_V: Weights, top_k: int | None, min_p: float, top_p: float, point: float) -> int:
    """Cuts to the likeliest (among equals the lowest ids), then takes the token at `point` of the rest's sum, by id."""
    order = np.argsort(-weights_V, kind="stable")
    sums = np.cumsum(weights_V[order])
    count = min(top_k or len(order), len(order))
    if min_p > 0:
        count = min(count, int((weights_V >= min_p * 2.0**UNIT_BITS).sum()))
    count = max(count, 1)
    if top_p < 1:
        total = int(sums[count - 1])
        wanted = min(max(math.ceil(top_p * float(total)), 1), total)
        count = int(np.searchsorted(sums[:count], wanted)) + 1
    kept = np.sort(order[:count])
    reached = np.cumsum(weights_V[kept])
    target = (int(point * 2.0**53) * int(reached[-1])) >> 53
    return int(kept[np.searchsorted(reached, target, side="right")])


def add(logits_V: Floats, ids: Ids, biases: NDArray[np.float64]) -> None:
    """Adds to some logits, in place."""
    logits_V[ids] = logits_V[ids].astype(np.float64) + biases


def penalize(logits_V: Floats, ids: Ids, counts: Ids, repetition: float, frequency: float, presence: float) -> None:
    """Makes tokens that were there less likely, in place."""
    found = logits_V[ids].astype(np.float64)
    found = np.where(found > 0, found / repetition, found * repetition)
    logits_V[ids] = (found - counts * frequency) - np.where(counts > 0, presence, 0.0)


def allowed(mask: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """The mask's bits, one for each id."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


def logprob(logits_V: Floats, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """ln of a token's probability, and the likeliest tokens with theirs."""
    largest = float(logits_V.max())
    below = largest + math.log(int(weigh(logits_V, 1.0).sum()) * 2.0**-UNIT_BITS)
    if not top:
        return float(logits_V[token]) - below, ()
    count = min(top, len(logits_V))
    least = np.partition(logits_V, len(logits_V) - count)[-count]
    ids = np.flatnonzero(logits_V >= least)
    ids = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
    return float(logits_V[token]) - below, tuple((int(i), float(logits_V[i]) - below) for i in ids)
