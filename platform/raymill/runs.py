"""A run: the folder `<storage>/<run>` that holds a job's artifacts, and what can be done with it.

run.yaml cluster.yaml      the settings of the last command, every default written out
<stage>-<hash8>/           artifacts; `.partial` ones are drafts that a kill left behind
api_keys.json              hashes of the endpoint's keys
endpoint.json              process and address of the endpoint while it is up
logs/                      what a detached endpoint says
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.artifact import MANIFEST, Artifact, open_artifact, write_atomic
from raymill.errors import ArtifactError, MachineError, UsageError

LIVE_FILE = "endpoint.json"
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Live:
    """An endpoint that is up."""

    pid: int
    url: str


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run for this process; MachineError when another one has it. The kernel frees it even after kill -9."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        why = error.strerror
        raise MachineError(f"{folder} cannot be written", why=why, fix="set `storage:` in the cluster file") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).decode() or "another process"
        os.close(descriptor)
        raise MachineError(
            f"run {folder.name} is in use by process {pid}",
            fix=f"wait for it, or stop it: raymill stop {folder.name}",
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def list_runs(storage: Path) -> list[Path]:
    """Every run folder, sorted by name."""
    if not storage.is_dir():
        return []
    return sorted(path for path in storage.iterdir() if (path / "run.yaml").is_file())


def find_run(storage: Path, name: str) -> Path:
    """The folder of a run; UsageError with near names when there is none."""
    folder = storage / name
    if (folder / "run.yaml").is_file():
        return folder
    names = [path.name for path in list_runs(storage)]
    near = difflib.get_close_matches(name, names, 1)
    fix = f"did you mean {near[0]}?" if near else f"runs here: {', '.join(names) or 'none yet'}"
    raise UsageError(f"there is no run {name} in {storage}", fix=fix)


def artifacts(folder: Path) -> list[Artifact]:
    """The readable artifacts of a run, oldest first; files are not checked."""
    found = []
    for manifest in folder.glob(f"*/{MANIFEST}"):
        try:
            found.append(open_artifact(manifest.parent, verify=False))
        except ArtifactError:
            continue  # `runs show` is for looking; the run itself reports damage
    return sorted(found, key=lambda artifact: (artifact.manifest.created_at, artifact.name))


def remove_run(folder: Path) -> None:
    """Deletes a run; MachineError while a process has it."""
    with locked(folder):
        shutil.rmtree(folder)


def write_live(folder: Path, url: str) -> None:
    """Records that this process serves the run at `url`."""
    write_atomic(folder / LIVE_FILE, json.dumps({"pid": os.getpid(), "url": url}))


def clear_live(folder: Path) -> None:
    (folder / LIVE_FILE).unlink(missing_ok=True)


def read_live(folder: Path) -> Live | None:
    """The endpoint of a run, if its process still holds the run's lock."""
    try:
        values: dict[str, Any] = json.loads((folder / LIVE_FILE).read_text(encoding="utf-8"))
        live = Live(**values)
        holder = (folder / ".lock").read_text(encoding="utf-8")
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    if holder != str(live.pid) or not _is_locked(folder):
        return None  # it was killed before it could clean up
    return live


def stop_endpoint(folder: Path) -> bool:
    """Asks the process that serves a run to stop and waits for it. False when none does."""
    live = read_live(folder)
    if live is None:
        return False
    os.kill(live.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while _is_locked(folder):
        if time.monotonic() > deadline:
            raise MachineError(f"process {live.pid} did not stop", fix=f"kill -9 {live.pid}")
        time.sleep(0.1)
    return True


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
