"""What every row of this table is given, and how it names a side."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.measure import ENVIRONMENT, Side
from benchmarks.peers import Peers
from benchmarks.training.tokens import rows_file, tokens_folder
from benchmarks.turns import Talk, play

SIDES = Path(__file__).parent / "sides"

TORCH = ("torch==2.13.0",)
"""Installed before every peer and moved by none: any other version would bring gigabytes of CUDA. For an installation
without CUDA its CPU build must be what pip finds under this name, as it is for raymill itself."""
PINS = {
    "transformers": ("transformers==5.23.0", "accelerate==1.15.0"),
    "litgpt": ("litgpt==0.5.9",),
}
"""The peers of this table; their environment takes a minute and 2 GB."""


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    peers: Peers
    cache: Path
    """Kept between runs."""
    work: Path
    """A folder of this run, removed at its end."""
    quick: bool

    @cached_property
    def tokens(self) -> Path:
        return tokens_folder(self.cache)

    @cached_property
    def rows(self) -> Path:
        return rows_file(self.tokens)

    def side(self, name: str, script: str, *options: object, peer: str | None = None) -> Side:
        """A script of `sides` in our interpreter, or in the peers'. On the last core, which they share in turns."""
        python = Path(sys.executable) if peer is None else self.peers.python
        core = ("--core", max(os.sched_getaffinity(0)))
        return Side(name, SIDES / f"{script}.py", python, [str(each) for each in (*core, *options)])

    def play(self, sides: Sequence[Side], rounds: int, unit: str, figure: Callable[[Any], float]) -> dict[str, Talk]:
        """All sides in turns; `figure` of a turn is told in `unit`."""
        return play(sides, rounds, lambda turn: f"{figure(turn):,.4g} {unit}", environment=ENVIRONMENT)

    def missing(self, *peers: str) -> dict[str, str]:
        """Those that could not be installed, and why."""
        return {name: self.peers.missing[name] for name in peers if name in self.peers.missing}
