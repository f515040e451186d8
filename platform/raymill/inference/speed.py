"""How fast models decode beside each other: tokens per second through the step that serves them.

The models take turns, burst by burst (first, second, first, second ...), and the median burst of each counts: a machine that
is slower for a while slows both, and one that stutters spoils single bursts only, so noise cannot fake a ratio. A burst
is 24 steps; for two models of 10 M parameters on one core everything takes some seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from raymill.inference.kv_cache import pages_for
from raymill.inference.step import Chunk, ModelStep

_STEPS = 24
_ROUNDS = 7
_FIRST_POSITION = 64
_PAGES = pages_for(_FIRST_POSITION + _STEPS)
"""Of one sequence."""


def pages_for_bursts(count: int) -> int:
    """Pages that so many sequences need while they are timed."""
    return count * _PAGES


def decode_speeds(steps: Mapping[str, ModelStep], counts: Sequence[int]) -> dict[tuple[str, int], float]:
    """Tokens per second by (name of the step, sequences at once), each step at the same positions.

    Each has at least `pages_for_bursts` pages for the largest count.
    """
    length = min(step.max_seq_len for step in steps.values())
    first = max(0, min(_FIRST_POSITION, length - _STEPS))
    positions = range(first, min(first + _STEPS, length))
    speeds = {}
    for count in counts:
        for step in steps.values():  # the first burst pays for memory and caches
            _burst_s(step, count, positions)
        bursts: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(_ROUNDS):
            for name, step in steps.items():
                bursts[name].append(_burst_s(step, count, positions))
        for name, took_s in bursts.items():
            speeds[name, count] = count * len(positions) / median(took_s)
    return speeds


def _burst_s(step: ModelStep, count: int, positions: range) -> float:
    table = np.arange(pages_for_bursts(count), dtype=np.int32).reshape(count, _PAGES)
    began = time.perf_counter()
    for position in positions:
        step([Chunk(slot, position, (0,), num_logits=1) for slot in range(count)], table)
    return time.perf_counter() - began
