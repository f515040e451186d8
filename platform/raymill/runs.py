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
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.artifact import MANIFEST, Artifact, Manifest, discard, open_artifact, read_manifest, write_atomic
from raymill.errors import ArtifactError, MachineError, UsageError

LIVE_FILE = "endpoint.json"
_LOCK = ".lock"
_LOCK_PATIENCE_S = 1.0  # who looks whether a run is up has its lock for a moment
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Live:
    """An endpoint that is up."""

    pid: int
    url: str


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run for this process; MachineError when another one has it. The kernel frees it even after kill -9."""
    descriptor = _take_lock(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take_lock(folder: Path) -> int:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            fix = "set `storage:` in the cluster file"
            raise MachineError(f"{folder} cannot be written", why=error.strerror, fix=fix) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(descriptor, folder / _LOCK):
                return descriptor
            os.close(descriptor)  # the run was removed meanwhile, its lock with it
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise _in_use(folder) from None
            time.sleep(0.05)


def _in_use(folder: Path) -> MachineError:
    pid = _holder(folder)
    by = "another process" if pid is None else f"process {pid}"
    fix = f"wait for it, or stop it: {stop_command(folder)}; what it has done so far is kept"
    return MachineError(f"run {folder.name} is in use by {by}", fix=fix)


def stop_command(folder: Path) -> str:
    """What to type to stop the run."""
    words = ["raymill", "stop", folder.name]
    if folder.parent != Path("runs"):
        words += ["--set", f"cluster.storage={json.dumps(str(folder.parent))}"]
    return shlex.join(words)


def list_runs(storage: Path) -> list[Path]:
    """Every run folder, sorted by name."""
    if not storage.is_dir():
        return []
    found = [path for path in storage.iterdir() if not path.name.startswith(".")]  # else half removed
    return sorted(path for path in found if (path / "run.yaml").is_file())


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


def newest(folder: Path, wanted: Callable[[Manifest], bool]) -> Artifact | None:
    """The last artifact of a run that is wanted. ArtifactError where it is damaged: an older one would be another model."""
    manifests = [(path.parent, read_manifest(path.parent)) for path in folder.glob(f"*/{MANIFEST}")]
    found = [(manifest.created_at, path.name, path) for path, manifest in manifests if wanted(manifest)]
    return open_artifact(max(found)[-1], verify=False) if found else None


def remove_run(folder: Path) -> None:
    """Deletes a run; MachineError while a process has it. Killed on the way, all of it or nothing is listed."""
    with locked(folder):
        discard(folder)
    for left in folder.parent.glob(".*.*.tmp"):  # by a process that was killed while it removed a run
        pid = left.name.split(".")[-2]
        if left.is_dir() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


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
        holder = (folder / _LOCK).read_text(encoding="utf-8")
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    if holder.split()[:1] != [str(live.pid)] or not is_locked(folder / _LOCK):
        return None  # it was killed before it could clean up
    return live


def stop_run(folder: Path) -> bool:
    """Asks the process that has a run, whatever it does with it, to stop, and waits. False when none has it.

    MachineError when it does not stop, or is not a process of this machine.
    """
    if not is_locked(folder / _LOCK):
        return False
    pid = _holder(folder)
    if pid is None:
        what = f"run {folder.name} is in use by a process that is not on this machine"
        raise MachineError(what, fix="stop it where it was started")
    with suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while is_locked(folder / _LOCK):
        if time.monotonic() > deadline:
            raise MachineError(f"process {pid} did not stop", fix=f"kill -9 {pid}")
        time.sleep(0.1)
    return True


def _holder(folder: Path) -> int | None:
    """The process that has, or had, the run, if it lives on this machine."""
    try:
        pid, machine = (folder / _LOCK).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return int(pid) if machine == socket.gethostname() and _is_alive(int(pid)) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_locked(lock: Path) -> bool:
    """Whether a living process holds this lock file. Looking bars nobody."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
