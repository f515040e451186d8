"""The end of a worker that no longer gets on: it writes down where each of its threads stands and ends, to be replaced.

Workers wait for each other in every step, so one that is stopped or lost holds up all. Each watches itself alone: the
others end because their own steps do not, and so does the one that was stopped, once it runs again. Whoever started the
group starts it anew, and it goes on from the newest checkpoint.

A thread looks four times in `timeout_s`; a beat costs a microsecond. Should Python itself stand still, because native
code keeps its lock, faulthandler's thread does the same a little later, with exit code 1.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

HUNG = 75
"""Exit code of a worker that ended itself: sysexits' EX_TEMPFAIL, for it is worth trying again."""
STACKS = "stacks"
_FIRST = 5
"""How many times longer the first step may take: it compiles, reads and allocates."""
_LOOKS = 4
_log = logging.getLogger(__name__)


class Watchdog:
    """A context around the steps of one worker. `beat` says that a step is done.

    After `timeout_s` without one, every thread's stack is appended to `folder`/stacks/rank-<rank>.txt, `tell` is given a
    line for the user, and `on_hang` is called with HUNG, all in the watching thread. One at a time in a process.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        timeout_s: float,
        tell: Callable[[str], object] = _log.error,
        on_hang: Callable[[int], None] = os._exit,
    ) -> None:
        self._path = folder / STACKS / f"rank-{rank}.txt"
        self._rank = rank
        self._timeout_s = timeout_s
        self._tell = tell
        self._on_hang = on_hang
        self._waiting = folder / STACKS / "waiting"
        self._waited_ns = 0
        self._step: int | None = None
        self._limit_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Step number `step` is done."""
        self._step = step
        self._limit_s = time.monotonic() + self._timeout_s

    def stop(self) -> None:
        """No step is to come: a last validation may take as long as it needs."""
        self._stop.set()

    def wait(self) -> None:
        """This worker waits for work beside training, and all others for it: no step is expected of anyone meanwhile.

        To be called every second or so; the other workers' watchdogs see it in the folder.
        """
        if not self._stop.is_set():
            self._waiting.touch()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._limit_s = time.monotonic() + _FIRST * self._timeout_s
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join()
        self._file.close()
        self._waiting.unlink(missing_ok=True)
        if not self._path.stat().st_size:
            self._path.unlink()
            with suppress(OSError):  # other ranks' may be there
                self._path.parent.rmdir()

    def _watch(self) -> None:
        wait_s = self._timeout_s / _LOOKS
        try:
            while not self._stop.wait(wait_s):
                now_s = time.monotonic()
                waited_ns = self._waiting.stat().st_mtime_ns if self._waiting.exists() else 0
                if waited_ns != self._waited_ns:
                    self._waited_ns = waited_ns
                    self._limit_s = max(self._limit_s, now_s + self._timeout_s)
                if now_s > self._limit_s:
                    try:
                        self._write_stacks()
                    finally:  # on a disk that takes nothing it ends all the same
                        self._on_hang(HUNG)
                    return
                late_s = self._limit_s - now_s + 2 * wait_s
                faulthandler.dump_traceback_later(late_s, file=self._file, exit=True)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _write_stacks(self) -> None:
        last = "its first step" if self._step is None else f"a step after step {self._step}"
        line = f"rank {self._rank} has not finished {last} in time ({self._timeout_s:g} s a step)"
        self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.write("\n")
        self._file.flush()
        self._tell(f"{line}; it ends, to be started again. Where its threads stand: {STACKS}/{self._path.name}")
