"""Checkpoints of a run in progress: written aside, published by one rename, verified before they are believed.

    <folder>/step-00000200/
        model.safetensors config.json     the weights, as in any checkpoint artifact
        optimizer.safetensors             `<state>/<parameter>` tensors
        state.json                        step, and the sha256 of every other file

The loader's position is the step itself. Two checkpoints are kept: should the newest be damaged, the one before serves.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raymill.artifact import FileEntry, check_file, list_files, sync_folder, write_atomic
from raymill.errors import ArtifactError, MachineError
from raymill.model.files import WEIGHTS
from raymill.model.transformer import Transformer
from raymill.model.weights import read_tensors, save_model

OPTIMIZER = "optimizer.safetensors"
CHECKPOINTS = "checkpoints"
STATE = "state.json"
_KEEP = 2


def save_checkpoint(folder: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, end_id: int) -> Path:
    """Publishes the state after `step` steps and forgets all but the newest two."""
    final = checkpoint_path(folder, step)
    aside = final.with_name(f"{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_model(aside, model, end_id)
        save_file(_optimizer_tensors(model, optimizer), aside / OPTIMIZER)
        files = [entry.model_dump() for entry in list_files(aside)]
        write_atomic(aside / STATE, json.dumps({"step": step, "files": files}))
        sync_folder(aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = f"{error.strerror or error}; a checkpoint takes about {_size_bytes(model):,} bytes"
        raise MachineError(
            f"no checkpoint can be written to {folder}", why=why, fix="free space there and run again"
        ) from None
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    for old in _checkpoints(folder)[:-_KEEP]:
        shutil.rmtree(old)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, int] | None:
    """The newest checkpoint whose every byte is as written, and its step; a damaged one is reported and passed over."""
    for path in reversed(_checkpoints(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            for entry in state["files"]:
                check_file(path / entry["path"], FileEntry(**entry), hashed=True, fix="none needed")
        except (ArtifactError, OSError, ValueError, KeyError) as error:
            what = error.what if isinstance(error, ArtifactError) else str(error)
            warn(f"checkpoint {path.name} is passed over: {what}")
            continue
        return path, int(state["step"])
    return None


def load_checkpoint(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer state back, bit for bit."""
    tensors = read_tensors(path / WEIGHTS)
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    saved = read_tensors(path / OPTIMIZER)
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        field, _, name = key.partition("/")
        state.setdefault(name, {})[field] = tensor
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = {field: tensor.to(parameter.device) for field, tensor in state[name].items()}


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder for this process. A second one waits for the kernel to release it when the first dies."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".writer", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{field}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for field, tensor in optimizer.state.get(parameter, {}).items()
    }


def _size_bytes(model: Transformer) -> int:
    # weights and AdamW's two moments
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
