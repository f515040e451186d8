"""The row of more workers: the product's train() on two processes of one thread each beside one, same global batch."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ENVIRONMENT, Side, flags, spread, take_turns
from benchmarks.table import Row
from benchmarks.training.bench import SIDES, Bench
from benchmarks.training.steps import DIM, LAYERS
from benchmarks.training.tokens import SEQ_LEN

_GLOBAL_BATCH_SIZE = 16
_NAMES = {1: "one worker", 2: "two workers"}


def workers(bench: Bench) -> list[Row]:
    steps, rounds = (6, 1) if bench.quick else (12, 5)
    options = flags(tokens=bench.tokens, folder=bench.work, layers=LAYERS, dim=DIM, seq_len=SEQ_LEN)
    options += flags(steps=steps, global_batch_size=_GLOBAL_BATCH_SIZE)
    script, python = SIDES / "workers_raymill.py", Path(sys.executable)
    sides = [Side(name, script, python, [*options, *flags(workers=number)]) for number, name in _NAMES.items()]
    found = take_turns(sides, rounds, lambda outcome: f"{_speed(outcome):,.0f} tokens/s", environment=ENVIRONMENT)
    one, two = (found[name] for name in _NAMES.values())
    alone, together = one.median(_speed), two.median(_speed)
    broken = [f"{name}: {outcomes.failure}" for name, outcomes in found.items() if outcomes.failure]
    note = f"batch {_GLOBAL_BATCH_SIZE} x {SEQ_LEN}, microbatches of 8, bits equal on both; wall time of steps, starts left out"
    return [
        Row(
            "two workers of one thread against one",
            "tokens/s",
            together,
            {"one worker of raymill": alone},
            spread(two.values(_speed)) if two.rounds else 0.0,
            rounds=len(two.rounds),
            note="; ".join([note, *broken]),
        )
    ]


def _speed(outcome: dict[str, Any]) -> float:
    """Tokens per wall second of the median step."""
    return float(outcome["tokens"]) / statistics.median(outcome["step_s"])
