"""Progress of long work on stderr: a live line on a terminal, one plain line now and then elsewhere.

Nothing is shown for work under 5 s. Rates are over the last 15 s of work, so the ETA follows a change of speed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

_QUIET_S = 5.0
_PLAIN_EVERY_S = 30.0
_LIVE_EVERY_S = 0.5
_WINDOW_S = 15.0


class Progress:
    """`update(done, total)` as often as you like; it decides when to write."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._started = time.monotonic()
        self._shown_at = self._started
        self._shown = False
        self._history: deque[tuple[float, float]] = deque()

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """`done` of `total` units so far; `note` is appended, for example the loss."""
        now = time.monotonic()
        if self._history and done < self._history[-1][1]:
            self._history.clear()  # work went back to a checkpoint
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[0][0] > _WINDOW_S:
            self._history.popleft()
        if self._due(now):
            self._write(self._line(now, done, total, unit, note))

    def waiting(self, what: str) -> None:
        """Work that has nothing to count yet: says what is waited for and since when."""
        now = time.monotonic()
        if self._due(now):
            self._write(f"{self.label}: {what}  {duration(now - self._started)}")

    def note(self, text: str) -> None:
        """One line that stays, for what a person should know though nothing failed."""
        self.close()
        self._stream.write(f"{self.label}: {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Removes the live line, so that the result line takes its place."""
        if self._live and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _due(self, now: float) -> bool:
        if now - self._started < _QUIET_S or now - self._shown_at < (_LIVE_EVERY_S if self._live else _PLAIN_EVERY_S):
            return False
        self._shown_at = now
        self._shown = True
        return True

    def _line(self, now: float, done: float, total: float | None, unit: str, note: str) -> str:
        (first_at, first), (last_at, last) = self._history[0], self._history[-1]
        rate = (last - first) / (last_at - first_at) if last_at > first_at else 0.0
        parts = [f"{self.label}: {done:,.0f}" + (f"/{total:,.0f}" if total else "") + f" {unit}"]
        if rate > 0:
            parts.append(f"{rate:,.0f} {unit}/s")
            if total:
                parts.append(f"ETA {duration(max(0.0, (total - done) / rate))}")
        if note:
            parts.append(note)
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
