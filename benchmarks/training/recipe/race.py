"""The race: CPU-seconds until a validation loss is reached, raymill's recipe beside the tuned reference.

The target is the reference's own loss at the end of its run, the median over the seeds. A recipe with a schedule is at
its best only where its schedule ends; so both sides run whole runs, the reference of the length it was tuned at, ours
of the fewest steps that reach the target. Seeds are taken in turns of both sides (A B A B), each run in a process of
its own on one core with one thread.

Tokens come from raymill's own prepare and tokenize, of the Python installation's text, once (half a minute, two
cores). The curves of both sides stay in `race.json` in the cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import Side, say, spread, take_turns
from benchmarks.table import OURS, Row
from benchmarks.training.recipe import settings

REFERENCE = "nanoGPT"
CURVES = "race.json"
_SIZE = "race"
_SEEDS = (0, 1, 2)
_ROOT = Path(__file__).parents[3]
_INDEX = "tokenize-*/index.json"
_RUN_LIMIT_S = 3600


@dataclass(frozen=True)
class Race:
    """Both sides' runs, seed by seed."""

    ours: list[dict[str, Any]]
    reference: list[dict[str, Any]]

    @property
    def target(self) -> float:
        """Nats per token."""
        return statistics.median(float(run["val_loss"]) for run in self.reference)

    @property
    def reached(self) -> bool:
        """Whether our median run is at the target."""
        return statistics.median(float(run["val_loss"]) for run in self.ours) <= self.target


def run(quick: bool, cache: Path) -> list[Row]:
    """The row of the race: three seeds, or with `quick` the first one (4 minutes)."""
    folder = cache / "race"
    shards = make_shards(folder, _SIZE)
    raced, size = race(shards, _SEEDS[:1] if quick else _SEEDS), settings.SIZES[_SIZE]
    facts = {"target": raced.target, "reached": raced.reached, "settings": size.ours.model_dump(mode="json")}
    facts |= {"reference": asdict(size.reference), "runs": asdict(raced)}
    (folder / CURVES).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return [row(raced)]


def make_shards(folder: Path, size: str) -> Path:
    """The tokens both sides read at a size, made where they are not there yet and kept from then on."""
    made = folder / "runs" / size
    if not list(made.glob(_INDEX)):
        folder.mkdir(parents=True, exist_ok=True)
        job = folder / f"{size}.yaml"
        stages = {
            "prepare": {"sources": ["builtin:python"], "val_fraction": 0.05},
            "tokenize": {"vocab_size": settings.SIZES[size].shape.vocab_size},
        }
        job.write_text(yaml.safe_dump({"name": size} | stages, sort_keys=False), "utf-8")
        command = [sys.executable, "-m", "raymill.cli", "run", job.name, "--no-serve"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the tokens of {size} could not be made: {(done.stdout + done.stderr)[-500:]}")
    (index,) = made.glob(_INDEX)
    return index.parent


def race(shards: Path, seeds: Sequence[int]) -> Race:
    """Every seed once on each side, in turns."""
    found: dict[str, list[dict[str, Any]]] = {OURS: [], REFERENCE: []}
    for seed in seeds:
        say(f"  seed {seed}")
        sides = [_side(name, shards, seed) for name in found]
        outcomes = take_turns(sides, 1, _tell, _RUN_LIMIT_S, import_path())
        for name, outcome in outcomes.items():
            if outcome.failure is not None:
                raise RuntimeError(f"{name} failed: {outcome.failure}")
            found[name] += outcome.rounds
    return Race(found[OURS], found[REFERENCE])


def import_path() -> dict[str, str]:
    """What a side's process needs to find this package."""
    return {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def row(raced: Race) -> Row:
    """CPU-seconds of both; none of ours where it missed the target."""
    times = [each["cpu_s"] for each in raced.ours]
    reference = statistics.median(each["cpu_s"] for each in raced.reference)
    note = "; ".join(f"{name}: {_describe(runs)}" for name, runs in ((OURS, raced.ours), (REFERENCE, raced.reference)))
    return Row(
        f"CPU-s to a loss of {raced.target:.3f}",
        "CPU-s",
        statistics.median(times) if raced.reached else None,
        {REFERENCE: reference},
        spread(times),
        lower_is_better=True,
        rounds=len(times),
        note=note if raced.reached else f"ours missed the target; {note}",
    )


def _describe(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    each = ", ".join(f"{run['val_loss']:.3f} in {run['cpu_s']:.1f} s" for run in runs)
    return f"{first['parameters']:,} parameters, {first['steps']} steps, {first['tokens']:,} tokens: {each}"


def _side(name: str, shards: Path, seed: int) -> Side:
    options = ["--side", "raymill" if name == OURS else "nanogpt", "--shards", str(shards), "--seed", str(seed)]
    core = str(max(os.sched_getaffinity(0)))
    return Side(name, Path(__file__).with_name("side.py"), Path(sys.executable), [*options, "--core", core])


def _tell(outcome: dict[str, Any]) -> str:
    return f"{outcome['val_loss']:.4f} nats in {outcome['cpu_s']:.1f} CPU-s"
