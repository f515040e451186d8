"""The row of the platform: what Ray Train, the loop, metrics and checkpoints add to the bare step of the same model.

Two parts: the median over steps of what a step of the product took more than the bare step after it; and what saving took
beside that, over all steps timed, per checkpoint, as its share where one is made every 200 steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import ENVIRONMENT, ONE_THREAD, error_line, flags, say
from benchmarks.table import Row
from benchmarks.training.bench import SIDES, Bench
from benchmarks.training.steps import BATCH_SIZE, DIM, LAYERS
from benchmarks.training.tokens import SEQ_LEN

_SAVE_EVERY = 200
_LIMIT_S = 3600
_WORK = f"platform over the bare step, {LAYERS} layers, {DIM} wide"


@dataclass(frozen=True)
class Overhead:
    """In parts of a bare step."""

    per_step: float
    per_checkpoint: float
    """What one save costs, over a step's time."""
    spread: float
    """Distance of the quartiles of the steps' differences."""

    @property
    def total(self) -> float:
        return self.per_step + self.per_checkpoint / _SAVE_EVERY


def overhead(product: Sequence[float], bare: Sequence[float], saves: int) -> Overhead:
    """From the seconds of steps that took turns."""
    step_s = statistics.median(bare)
    more = [(one - other) / step_s for one, other in zip(product, bare, strict=True)]
    usual = statistics.median(more)
    beside = max(0.0, sum(more) - usual * len(more))
    low, _, high = statistics.quantiles(more, n=4, method="inclusive")
    return Overhead(usual, beside / saves if saves else 0.0, high - low)


def platform(bench: Bench) -> list[Row]:
    steps, save_every = (9, 4) if bench.quick else (60, 20)
    options = flags(tokens=bench.tokens, folder=bench.work, layers=LAYERS, dim=DIM, seq_len=SEQ_LEN)
    options += flags(batch_size=BATCH_SIZE, steps=steps, save_every=save_every)
    command = [sys.executable, str(SIDES / "platform_raymill.py"), *options]
    surroundings = {**os.environ, **ONE_THREAD, **ENVIRONMENT}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=_LIMIT_S)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()][-20:]
        say("\n".join(f"    {line}" for line in said))  # Ray wraps what failed in errors of its own
        return [Row(_WORK, "% of CPU", None, lower_is_better=True, note=error_line(done.stderr))]
    times: list[dict[str, list[float]]] = json.loads(done.stdout.strip().splitlines()[-1])
    return [_row(times, (steps - 1) // save_every)]


def _row(times: list[dict[str, list[float]]], saves: int) -> Row:
    """Each time is [wall, CPU of the process, CPU of the loop's thread]."""
    bare_cpu = [each["bare"][2] for each in times]
    beside = [each["bare"][1] - each["bare"][2] for each in times]  # other threads: Ray's always, a save's at times
    usual = statistics.median(beside)
    product_cpu = [each["product"][1] + max(0.0, more - usual) for each, more in zip(times, beside, strict=True)]
    cpu = overhead(product_cpu, bare_cpu, saves)
    wall = overhead([each["product"][0] for each in times], [each["bare"][0] for each in times], saves)
    thread = overhead([each["product"][2] for each in times], bare_cpu, saves)
    say(f"  a bare step {statistics.median(bare_cpu):.2f} CPU-s, the product's {statistics.median(product_cpu):.2f}")
    notes = [
        f"wall {wall.total:.2%} (spread {wall.spread:.1%}), the loop's own thread {thread.total:.2%}",
        f"per step {cpu.per_step:.2%} of CPU, per checkpoint {cpu.per_checkpoint:.0%} of a step, one in {_SAVE_EVERY}",
        f"{len(times)} steps of {statistics.median(bare_cpu):.2f} CPU-s, {saves} checkpoints; starts left out",
        "spread: distance of the quartiles, in % of a step",
    ]
    return Row(
        _WORK,
        "% of CPU",
        100 * cpu.total,
        spread=cpu.spread,
        rounds=len(times),
        lower_is_better=True,
        note="; ".join(notes),
    )
