"""One attempt at the data stages of a job, in a process of its own and without Ray, that may be hurt on its way.

    python attempt.py JOB STORAGE SEED             undisturbed; prints how many points it passed, and which of them synced
                                                   a report: where that lies, other work counts as done
    python attempt.py JOB STORAGE SEED N kill      killed by SIGKILL at its Nth point, the file it writes half written
    python attempt.py JOB STORAGE SEED N ENOSPC    from its Nth point on the machine answers this to whatever adds or changes

A point is a file opened for writing, synced, renamed or removed, or a folder made or removed, below the storage. What the
workers would do is done here, item by item in an order drawn with the seed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import raymill.cluster.data
from raymill.cli import main
from raymill.errors import RaymillError

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_FREES = {"os.remove", "os.rmdir"}
_sync = os.fsync


class Trouble:
    """Counts the points and makes the trouble at the one that was asked for."""

    def __init__(self, storage: str, point: int, what: str) -> None:
        self.passed = 0
        self.reports: list[int] = []
        self._opened = ""
        self._storage = storage
        self._point = point
        self._what = what

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: what it raises becomes the error of the call."""
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event != "open" and event not in _CHANGES:
            return
        in_opened_folder = event in _FREES and arguments[1] >= 0  # so shutil.rmtree names what it removes
        if in_opened_folder or str(arguments[0]).startswith(self._storage):
            self._opened = str(arguments[0]) if event == "open" else self._opened
            self._pass(frees=event in _FREES, file=None, path=str(arguments[0]))

    def on_sync(self, file: int) -> None:
        """In the place of os.fsync."""
        self._pass(frees=False, file=file, path=None)
        if ".json" in self._opened and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            self.reports.append(self.passed)
        _sync(file)

    def _pass(self, *, frees: bool, file: int | None, path: str | None) -> None:
        self.passed += 1
        if self.passed < self._point or not self._point:
            return
        if self._what == "kill":
            if file is not None and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif not frees:
            number = getattr(errno, self._what)
            raise OSError(number, os.strerror(number), *([path] if path else []))  # a descriptor has no name


def map_here(draw: random.Random) -> Callable[..., Iterator[Any]]:
    """`map_items` without Ray."""

    def map_items(cluster: object, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        guarded = raymill.cluster.data._Guarded(work)
        for item in draw.sample(list(items), len(items)):
            result = pickle.loads(guarded({"item": pickle.dumps(item)})["result"])
            if isinstance(result, RaymillError):
                raise result
            yield result

    return map_items


if __name__ == "__main__":
    job, storage, seed, *trouble = sys.argv[1:]
    made = Trouble(storage, int(trouble[0]) if trouble else 0, trouble[1] if trouble else "")
    raymill.cluster.data.map_items = map_here(random.Random(int(seed)))
    os.fsync = made.on_sync  # type: ignore[assignment]
    sys.addaudithook(made.on_event)
    sys.argv = ["raymill", "run", job, "--set", f"cluster.storage={storage}"]
    try:
        main()
    finally:
        print(json.dumps({"points": made.passed, "reports": made.reports}))
