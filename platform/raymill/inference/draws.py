"""The arithmetic of choosing a token, in numpy: what runs where there is no compiler, and what native/sample.cpp must equal.

Every operation that decides a token is written in the order in which the compiled code does it: elementwise in fp64
without fused steps, then sums of integers. A drawn row costs about 1 ms at vocabulary 32,000 (compiled: some 40 us).

Shapes: V vocab_size, K ids that are changed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from raymill.errors import ArtifactError
from raymill.inference.step import Floats

Ids = NDArray[np.int64]
Weights = NDArray[np.int64]

UNIT_BITS = 43
"""The likeliest token weighs 2**43: sums of MOST_IDS tokens fit, and what cannot be drawn is below 1e-13 of it."""
MOST_IDS = 2**20 - 1
_NEAREST = 1.5 * 2.0**52 + UNIT_BITS  # added to a double of this size, it leaves the nearest integer
_LOG2_E = 1.4426950408889634
_LOWEST = -60.0  # 2**(43 - 60) rounds to 0
_SERIES = (
    *(0.00015453162949152332, 0.0013390863364649932, 0.009618082557265605),
    *(0.05550357114219167, 0.24022650760568237, 0.6931471880262288, 1.0),
)
"""2**f for f from -1/2 to 1/2, fitted at Chebyshev's points: within 6e-9 of itself."""


def check_vocabulary(vocab_size: int, where: str) -> None:
    """ArtifactError for a model with more ids than can be drawn from: sums of so many weights would overflow."""
    if vocab_size > MOST_IDS:
        what, why = f"a vocabulary of {vocab_size:,} ids is too large", f"a token is drawn from at most {MOST_IDS:,}"
        fix = "name a model with a smaller vocabulary, or set serve.engine to vllm"
        raise ArtifactError(what, where=where, why=why, fix=fix)


def weigh(logits_V: Floats, temperature: float) -> Weights:
    """round(2**43 * exp((logit - largest) / temperature)) of each token."""
    wide_V = logits_V.astype(np.float64)
    powers_V = np.maximum((wide_V - wide_V.max()) * min(_LOG2_E / temperature, 1e300), _LOWEST)
    wholes_V = (powers_V + _NEAREST) - _NEAREST
    fractions_V = powers_V - wholes_V
    series_V = np.full_like(fractions_V, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series_V = series_V * fractions_V + coefficient
    weights_V: Weights = np.rint(np.ldexp(series_V, wholes_V.astype(np.int32) + UNIT_BITS)).astype(np.int64)
    return weights_V


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
    """The mask's bits, one for each id; ids beyond the mask are not allowed."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").astype(bool)


def logprob(logits_V: Floats, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """ln of a token's probability, and the likeliest tokens with theirs; NaN, of id 0, where the row is not finite."""
    if not np.isfinite(logits_V).all():
        return math.nan, ((0, math.nan),) * min(top, len(logits_V))
    largest = float(logits_V.max())
    below = largest + math.log(int(weigh(logits_V, 1.0).sum()) * 2.0**-UNIT_BITS)
    if not top:
        return float(logits_V[token]) - below, ()
    count = min(top, len(logits_V))
    least = np.partition(logits_V, len(logits_V) - count)[-count]
    ids = np.flatnonzero(logits_V >= least)
    ids = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
    return float(logits_V[token]) - below, tuple((int(i), float(logits_V[i]) - below) for i in ids)
