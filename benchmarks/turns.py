"""Sides that stay: each keeps one process for the whole comparison, warms up once, and works when it is its turn.

A side says one line of JSON when it is ready (what it is), one for each turn (what it did), and one at its end. Turns are
short (a step), so that all sides meet the same minutes of a busy machine, and starts are paid once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks.measure import ONE_THREAD, Side, error_line, say, spread


@dataclass
class Talk:
    """What one side said."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Its first line and, over it, its last."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def median(self, figure: Callable[[dict[str, Any]], float]) -> float | None:
        """Over the turns; None where the side failed."""
        if self.failure is not None or not self.turns:
            return None
        return statistics.median(figure(each) for each in self.turns)

    def spread(self, figure: Callable[[dict[str, Any]], float]) -> float:
        return spread([figure(each) for each in self.turns]) if self.turns else 0.0


def play(
    sides: Sequence[Side],
    rounds: int,
    tell: Callable[[dict[str, Any]], str],
    limit_s: float = 300.0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Talk]:
    """Every side `rounds` turns, one side at a time. A side that fails or is silent for `limit_s` is out."""
    talks = {side.name: Talk() for side in sides}
    running: dict[str, _Running] = {}
    try:
        for side in sides:
            running[side.name] = _Running(side, limit_s, environment or {})
            running[side.name].hear(talks[side.name], "facts")
        for number in range(rounds):
            for side in sides:
                talk = talks[side.name]
                if talk.failure is None and running[side.name].ask(talk):
                    say(f"  round {number + 1} of {rounds}: {side.name} {tell(talk.turns[-1])}")
        for side in sides:
            running[side.name].finish(talks[side.name])
    finally:
        for each in running.values():
            each.kill()
    for name, talk in talks.items():
        if talk.failure is not None:
            say(f"  {name} failed: {talk.failure}")
    return talks


class _Running:
    """One side's process."""

    def __init__(self, side: Side, limit_s: float, environment: Mapping[str, str]) -> None:
        self._limit_s = limit_s
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(side.python), str(side.script), *side.options],
            env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, talk: Talk) -> bool:
        """One turn; False when it gave none."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it died of is heard next
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.hear(talk, "turns")

    def hear(self, talk: Talk, kind: str) -> bool:
        assert self._process.stdout is not None
        late = threading.Timer(self._limit_s, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        finished = late.finished.is_set()
        late.cancel()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            talk.failure = f"silent for {self._limit_s:g} s" if finished else error_line(self._errors.read())
            return False
        if kind == "turns":
            talk.turns.append(json.loads(line))
        else:
            talk.facts |= json.loads(line)
        return True

    def finish(self, talk: Talk) -> None:
        """Its last line."""
        assert self._process.stdin is not None
        if talk.failure is None:
            self._process.stdin.close()
            if self.hear(talk, "facts"):
                self._process.wait()

    def kill(self) -> None:
        """Nothing to do where it ended by itself."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def failures(talks: Mapping[str, Talk], missing: Mapping[str, str]) -> list[str]:
    """A note for each side without a figure."""
    broken = {name: talk.failure for name, talk in talks.items() if talk.failure is not None}
    return [f"no figure of {name}: {why}" for name, why in (broken | dict(missing)).items()]
