"""Checkpoints of a run in progress: written aside, published by one rename, verified before they are believed.

    <folder>/step-00000200/
        model.safetensors config.json     the weights, as in any checkpoint artifact
        optimizer.safetensors             `<field>/<parameter name>` tensors
        ema.safetensors                   the running mean of the weights, where there is one
        state.json                        step, what else the loop keeps, the sha256 of every file and of itself

The loader's position is the step itself. Two checkpoints are kept: should the newest be damaged, the one before serves.
Training pays for a copy in memory alone (training/snapshot.py); all that stands here runs beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raymill.artifact import FileEntry, check_file, discard, sweep_asides, sync, write_atomic
from raymill.errors import ArtifactError, MachineError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, WEIGHTS, read_config, read_model_config
from raymill.model.weights import read_tensors, read_weights, stored_weights
from raymill.training.tensorfile import TensorFile

OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"
CHECKPOINTS = "checkpoints"
STATE = "state.json"
_KEEP = 2
_PARTIAL = ".partial"

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by the file they go to: WEIGHTS, OPTIMIZER, EMA."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors on the CPU, weights by parameter name."""

    step: int
    files: dict[str, dict[str, Tensor]]
    config: dict[str, Any]
    """config.json, in Hugging Face's words."""
    state: dict[str, Any]
    """What the loop keeps beside tensors."""


def write_checkpoint(
    folder: Path, step: int, files: Files, config_json: dict[str, Any], state: Mapping[str, Any]
) -> Path:
    """Publishes the state after `step` steps; keeps it and the newest before it.

    Tensors lie on the CPU, weights under their parameters' names. MachineError when the disk takes no more; the
    checkpoints of before are as they were then.
    """
    final = checkpoint_path(folder, step)
    aside = final.with_name(f"{final.name}{_PARTIAL}")
    stored = {**files, WEIGHTS: stored_weights(ModelConfig.from_hugging_face(config_json), files[WEIGHTS])}
    outputs = {name: TensorFile(tensors) for name, tensors in stored.items()}
    size_bytes = sum(output.size_bytes for output in outputs.values())
    try:
        _sweep(folder)
        aside.mkdir(parents=True)
        entries = [_entry(aside / name, output.write(aside / name)) for name, output in outputs.items()]
        config = (json.dumps(config_json, indent=1) + "\n").encode()
        write_atomic(aside / CONFIG, config)
        entries.append(_entry(aside / CONFIG, hashlib.sha256(config).hexdigest()))
        content = {"step": step, "state": dict(state), "files": [entry.model_dump() for entry in entries]}
        write_atomic(aside / STATE, json.dumps({"sha256": _digest(content), "content": content}))
        sync(aside)
        if final.exists():
            discard(final)
        aside.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        free_bytes = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise MachineError(
            f"no checkpoint can be written to {folder}",
            why=f"{error.strerror or error}; a checkpoint takes {size_bytes:,} bytes, {free_bytes:,} are free",
            fix="free space there and run again: it continues from the checkpoint before",
        ) from None
    _forget(folder, step)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, int] | None:
    """The newest checkpoint whose every byte is as written, and its step; a damaged one is reported and passed over."""
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            content = _read_state(path)
            for entry in content["files"]:
                check_file(path / entry["path"], FileEntry(**entry), hashed=True, fix="none needed")
        except ArtifactError as error:
            warn(f"checkpoint {path.name} is passed over: {error.what}")
            continue
        except OSError as error:
            warn(f"checkpoint {path.name} is passed over: {error}")
            continue
        except (ValueError, KeyError, TypeError):
            warn(f"checkpoint {path.name} is passed over: {path / STATE} is damaged")
            continue
        return path, int(content["step"])
    if found:
        warn(f"no checkpoint in {folder} is whole: training starts again from its first step")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """What `write_checkpoint` was given, bit for bit. For one that `newest_checkpoint` has named."""
    content = _read_state(path)
    names = [entry["path"] for entry in content["files"] if entry["path"] not in (CONFIG, WEIGHTS)]
    config, vocab_size = read_model_config(path)
    files = {WEIGHTS: read_weights(path, config, vocab_size)}
    files |= {name: read_tensors(path / name) for name in names}
    return Checkpoint(content["step"], files, read_config(path), content["state"])


def saved_state(path: Path) -> dict[str, Any]:
    """What the loop kept beside tensors, without reading those. For one that `newest_checkpoint` has named."""
    state: dict[str, Any] = _read_state(path)["state"]
    return state


def check_writable(folder: Path, bytes_needed: int) -> None:
    """MachineError unless checkpoints of that many bytes can be written here; for before the first step."""
    missing = max(0, _KEEP - len(_checkpoints(folder))) + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "writable", b"raymill")
        (folder / "writable").unlink()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise MachineError(
            f"no checkpoint can be written to {folder}",
            why=str(error.strerror or error),
            fix="name a storage that this user may write to",
        ) from None
    if free_bytes < missing * bytes_needed:
        raise MachineError(
            f"{folder} has no room for checkpoints",
            why=f"{missing} more of {bytes_needed:,} bytes are kept for a moment; {free_bytes:,} bytes are free",
            fix="free space there, or name another storage",
        )


@contextmanager
def only_writer(folder: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Holds the folder for this process; MachineError when another one holds it.

    Waits a little first: a worker group that is started again may meet its dying predecessor, whose hold the kernel
    ends with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".writer", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _hold(descriptor, folder, time.monotonic() + patience_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int, folder: Path, until_s: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until_s:
                time.sleep(0.05)
                continue
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise MachineError(
                f"another process trains in {folder}",
                why=f"process {holder} holds it",
                fix=f"wait for it, or end it: kill {holder}",
            ) from None


def _read_state(path: Path) -> dict[str, Any]:
    """The content of state.json; ArtifactError when it is not what its own digest says."""
    values = json.loads((path / STATE).read_text(encoding="utf-8"))
    content: dict[str, Any] = values["content"]
    if values["sha256"] != _digest(content) or checkpoint_path(path.parent, content["step"]) != path:
        raise ArtifactError(
            f"{path / STATE} is damaged", why="its sha256 differs from its content's", fix="none needed"
        )
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entry(file: Path, sha256: str) -> FileEntry:
    return FileEntry(path=file.name, size_bytes=file.stat().st_size, sha256=sha256)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != _PARTIAL)


def _sweep(folder: Path) -> None:
    """Removes what a killed writer left."""
    for left in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(left)
    sweep_asides(folder)


def _forget(folder: Path, step: int) -> None:
    """Keeps the newest up to `step`. Later ones are damaged, or of a course that was rolled back."""
    found = _checkpoints(folder)
    newest = checkpoint_path(folder, step)
    kept = [path for path in found if path <= newest][-_KEEP:]
    for path in found:
        if path not in kept:
            with suppress(FileNotFoundError):
                discard(path)
