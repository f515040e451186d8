"""Rates of this part of the line: MB (10^6 bytes of text) per CPU second of scripts that get the same documents."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Outcomes, spread, take_turns
from benchmarks.table import OURS, Row

SIDES = Path(__file__).parent / "sides"


@dataclass(frozen=True)
class Side:
    """One script of `sides` and what it is given."""

    name: str
    """How the table calls it."""
    script: str
    python: Path
    limit_mb: float
    """Text it works on: less for the slow ones, the first documents of the same corpus."""


@dataclass(frozen=True)
class Rate:
    """One side over all rounds."""

    value: float
    """Median, MB per CPU second."""
    spread: float
    """Distance of the quartiles over the median."""
    wall: float
    """Median, MB per wall second."""
    megabytes: float
    rounds: int
    failure: str | None = None
    """Why there is no figure."""


def compare(
    sides: Sequence[Side],
    inputs: Sequence[Path],
    rounds: int,
    results: Path | None = None,
    extra: Sequence[str] = (),
) -> dict[str, Rate]:
    """Every side `rounds` times in turns. With `results`, each side's first round leaves `<script>.json` there."""
    core = str(max(os.sched_getaffinity(0)))
    scripts = [
        measure.Side(
            side.name,
            SIDES / f"{side.script}.py",
            side.python,
            [*map(str, inputs), "--limit-mb", str(side.limit_mb), "--core", core, *extra],
            ["--results", str(results / f"{side.script}.json")] if results is not None else [],
        )
        for side in sides
    ]
    found = take_turns(scripts, rounds, lambda outcome: f"{outcome['bytes'] / 1e6 / outcome['cpu_s']:.3g} MB/s")
    return {name: _rate(outcomes) for name, outcomes in found.items()}


def _rate(found: Outcomes) -> Rate:
    if found.failure is not None or not found.rounds:
        return Rate(0.0, 0.0, 0.0, 0.0, 0, found.failure or "no round")
    speeds = found.values(lambda each: each["bytes"] / 1e6 / each["cpu_s"])
    wall = statistics.median(found.values(lambda each: each["bytes"] / 1e6 / each["wall_s"]))
    return Rate(statistics.median(speeds), spread(speeds), wall, found.rounds[0]["bytes"] / 1e6, len(speeds))


def rate_row(work: str, rates: Mapping[str, Rate], missing: Mapping[str, str]) -> Row:
    """A row of MB/s from what `compare` measured; `missing` are peers that could not be installed."""
    ours = rates[OURS]
    failures = {name: rate.failure for name, rate in rates.items() if rate.failure is not None} | dict(missing)
    values = {name: None if rate.failure else rate.value for name, rate in rates.items() if name != OURS}
    samples = ", ".join(f"{name} {rate.megabytes:.3g}" for name, rate in rates.items() if rate.failure is None)
    notes = [f"MB timed: {samples}", *(f"no figure of {name}: {why}" for name, why in failures.items())]
    return Row(
        work,
        "MB/s",
        None if ours.failure else ours.value,
        values | dict.fromkeys(missing),
        ours.spread,
        rounds=ours.rounds,
        note="; ".join(notes),
    )
