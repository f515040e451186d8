"""How a comparison is run: sides take turns (A B A B), each in a process of its own on one core with one thread.

`take_turns` gives every round's result of every side; `watch` runs a whole command on some cores and samples what its
process tree holds. Rates are by CPU seconds where one core works, because a busy machine changes those least.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_THREADS = ("OMP", "MKL", "OPENBLAS", "RAYON", "NUMBA", "ARROW", "NUMEXPR")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in _THREADS} | {"TOKENIZERS_PARALLELISM": "false"}
_SIDE_LIMIT_S = 900
_SAMPLE_S = 0.25
_MARK = "RAYMILL_BENCHMARK"
_TICKS = os.sysconf("SC_CLK_TCK")

ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        each for each in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")) if each
    ),
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Of every side that compares with the product."""


@dataclass(frozen=True)
class Side:
    """One script and what it is given. Its last line of output is one JSON object: the round's result."""

    name: str
    """How the table calls it."""
    script: Path
    python: Path
    options: Sequence[str] = ()
    first_options: Sequence[str] = ()
    """Given in the first round only."""


@dataclass
class Outcomes:
    """What one side gave."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    """Why there is no figure."""

    def values(self, figure: Callable[[dict[str, Any]], float]) -> list[float]:
        return [figure(each) for each in self.rounds]

    def median(self, figure: Callable[[dict[str, Any]], float]) -> float | None:
        """None where the side failed."""
        return None if self.failure is not None or not self.rounds else statistics.median(self.values(figure))


@dataclass(frozen=True)
class Watched:
    """One run of a whole command."""

    wall_s: float
    cpu_s: float
    """Of every process of the tree, as last seen."""
    peak_bytes: int
    """Largest sum of the proportional set sizes (PSS) of the tree's processes, sampled four times a second."""
    failure: str | None = None


def take_turns(
    sides: Sequence[Side],
    rounds: int,
    tell: Callable[[dict[str, Any]], str],
    limit_s: float = _SIDE_LIMIT_S,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Outcomes]:
    """Every side `rounds` times in turns; one that fails is left out from then on. `tell` words a result."""
    found = {side.name: Outcomes() for side in sides}
    for number in range(rounds):
        for side in sides:
            if found[side.name].failure is not None:
                continue
            options = [*side.options, *(side.first_options if number == 0 else ())]
            outcome = _run([str(side.python), str(side.script), *options], limit_s, environment or {})
            if isinstance(outcome, str):
                found[side.name].failure = outcome
                say(f"  {side.name} failed: {outcome}")
            else:
                found[side.name].rounds.append(outcome)
                say(f"  round {number + 1} of {rounds}: {side.name} {tell(outcome)}")
    return found


def _run(command: Sequence[str], limit_s: float, environment: Mapping[str, str]) -> dict[str, Any] | str:
    surroundings = {**os.environ, **ONE_THREAD, **environment}
    try:
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"took more than {limit_s:g} s"
    if done.returncode != 0:
        return error_line(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def error_line(text: str) -> str:
    """The line that names the error: some libraries print more after it."""
    lines = text.strip().splitlines() or ["it ended without a word"]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines)[-1][:200]


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median; 0 for one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def watch(
    command: Sequence[str], cores: set[int], environment: Mapping[str, str], log: Path, limit_s: float
) -> Watched:
    """Runs a command on these cores. Its processes are found by a mark in their environment, so daemons count too."""
    mark = uuid.uuid4().hex
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited by the command
    began = time.monotonic()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment, _MARK: mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, mine)
    tree = _Tree(mark)
    failure = None
    try:
        while process.poll() is None and failure is None:
            tree.sample()
            time.sleep(_SAMPLE_S)
            if time.monotonic() - began > limit_s:
                failure = f"took more than {limit_s:g} s"
    finally:
        if process.poll() is None:  # too slow, or we were interrupted: it has a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if failure is None and process.returncode != 0:
        failure = f"exit {process.returncode}: {error_line(log.read_text('utf-8', 'replace'))}"
    return Watched(time.monotonic() - began, tree.cpu_s, tree.peak_bytes, failure)


class _Tree:
    """The processes that carry a mark."""

    def __init__(self, mark: str) -> None:
        self._needle = f"{_MARK}={mark}".encode()
        self._members: dict[tuple[str, str], float] = {}
        self._others: set[tuple[str, str]] = set()
        self.peak_bytes = 0

    @property
    def cpu_s(self) -> float:
        return sum(self._members.values())

    def sample(self) -> None:
        held = 0
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    held += self._look(folder)
                except (OSError, IndexError):  # it ended meanwhile, or is another user's
                    continue
        self.peak_bytes = max(self.peak_bytes, held)

    def _look(self, folder: Path) -> int:
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        key = (folder.name, stat[19])
        if key in self._others:
            return 0
        if key not in self._members and self._needle not in (folder / "environ").read_bytes():
            # A process that was just forked carries its parent's environment until it replaces itself: look again then.
            if (time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / _TICKS) > 2:
                self._others.add(key)
            return 0
        self._members[key] = (int(stat[11]) + int(stat[12])) / _TICKS
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def flags(**values: object) -> list[str]:
    """`--seq-len 256` of seq_len=256."""
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
