"""One attempt at a job up to train, in a process of its own and without Ray, that may be hurt on its way.

    python attempt.py JOB STORAGE SEED             undisturbed; prints how many points it passed, and which of them synced
                                                   a report: where that lies, other work counts as done
    python attempt.py JOB STORAGE SEED N kill      killed by SIGKILL at its Nth point, the file it writes half written
    python attempt.py JOB STORAGE SEED N ENOSPC    from its Nth point on the machine answers this to whatever adds or changes
    python attempt.py JOB STORAGE SEED N fill      at its Nth point others take the disk but for ROOM_BYTES
    ... SEED N kill WHERE                          only paths that hold WHERE count, and only they are refused

A point is a file opened for writing, synced, renamed or removed, or a folder made or removed, below the storage. What the
workers would do is done here: of the data stages item by item in an order drawn with the seed, of train by the only
worker, which notes in STORAGE.order what it trained on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import raymill.cluster.data
from raymill.cli import main
from raymill.errors import RaymillError
from raymill.stages import train
from raymill.stages.contract import Inputs

ROOM_BYTES = 40_000
"""Less than a checkpoint of the tests takes, and more than the rest that an attempt writes."""
_CURVES = ("/metrics.jsonl", "/validation.jsonl")
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_FREES = {"os.remove", "os.rmdir"}
_sync = os.fsync


class Trouble:
    """Counts the points and makes the trouble at the one that was asked for."""

    def __init__(self, storage: str, point: int, what: str, where: str) -> None:
        self.passed = 0
        self.reports: list[int] = []
        self._storage = storage
        self._point = point
        self._what = what
        self._where = where

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: what it raises becomes the error of the call."""
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event != "open" and event not in _CHANGES:
            return
        in_opened_folder = event in _FREES and arguments[1] >= 0  # so shutil.rmtree names what it removes
        if in_opened_folder or str(arguments[0]).startswith(self._storage):
            self._pass(str(arguments[0]), frees=event in _FREES, file=None)

    def on_sync(self, file: int) -> None:
        """In the place of os.fsync."""
        path = str(Path(f"/proc/self/fd/{file}").readlink())
        self._pass(path, frees=False, file=file)
        if ".json" in path and _is_writable(file):
            self.reports.append(self.passed)
        _sync(file)

    def _pass(self, path: str, *, frees: bool, file: int | None) -> None:
        if self._where not in path:
            return
        self.passed += 1
        if self.passed < self._point or not self._point:
            return
        if self._what == "kill":
            self._point = 0
            if file is not None and _is_writable(file):
                os.ftruncate(file, os.fstat(file).st_size // 2)
            elif path.endswith(_CURVES):
                os.write(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'{"step": 1')
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._what == "fill":
            self._point = 0
            _fill(self._storage)
        elif not frees:
            number = getattr(errno, self._what)
            raise OSError(number, os.strerror(number), *([path] if file is None else []))  # a descriptor has no name


def _is_writable(file: int) -> bool:
    return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _fill(storage: str) -> None:
    """Leaves ROOM_BYTES on the disk."""
    disk = os.statvfs(storage)
    ballast = os.open(f"{storage}/ballast", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(ballast, 0, disk.f_bavail * disk.f_frsize - ROOM_BYTES)
    os.close(ballast)


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


def train_here(storage: str) -> Callable[..., None]:
    """`place_workers` without Ray: this process is the only worker."""

    def place_workers(config: train.Config, settings: dict[str, Any], inputs: Inputs, cluster: object) -> None:
        with noted_order(f"{storage}.order"), suppress(RaymillError):  # it is written down, as in any worker
            train.work_as_worker(settings)
        train._Shown(config, inputs).update()

    return place_workers


@contextmanager
def noted_order(path: str) -> Iterator[None]:
    """Adds a line to the file for each microbatch: its step and place, and the sha256 of its ids."""
    from raymill.dataset.loader import Batch, Loader

    read = Loader.batch

    def batch(loader: Loader, step: int, first: int, count: int) -> Batch:
        made = read(loader, step, first, count)
        if loader._stream.split == "train":
            ids = made.inputs_BT.numpy().tobytes() + made.targets_BT.numpy().tobytes()
            os.write(file, f"{step} {first} {hashlib.sha256(ids).hexdigest()}\n".encode())
        return made

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Loader.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loader.batch = read  # type: ignore[method-assign]
        os.close(file)


if __name__ == "__main__":
    job, storage, seed, *trouble = sys.argv[1:]
    point, what, where = int(trouble[0]) if trouble else 0, *(*trouble[1:], "", "")[:2]
    made = Trouble(f"{storage}/", point, what, where)
    raymill.cluster.data.map_items = map_here(random.Random(int(seed)))
    train.place_workers = train_here(storage)
    os.fsync = made.on_sync  # type: ignore[assignment]
    sys.addaudithook(made.on_event)
    sys.argv = ["raymill", "run", job, "--set", f"cluster.storage={storage}"]
    try:
        main()
    finally:
        print(json.dumps({"points": made.passed, "reports": made.reports}))
