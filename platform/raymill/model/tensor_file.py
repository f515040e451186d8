"""A checkpoint's tensors as numpy arrays, read one at a time. No torch here, and nothing is unpickled.

In: a model's folder, its weights whole or in shards. Out: names, shapes and types at once; numbers when they are asked
for, each from its place in the file into memory of its own, so that a model never lies in memory twice.

A header is checked by safetensors itself before anything is believed: that it is JSON of a bounded size, that shapes and
types fill exactly the bytes they name, and that those lie inside the file without a gap or an overlap.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from raymill.errors import ArtifactError
from raymill.model.files import ANEW, SHARDS, WEIGHTS

_TYPES: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1"}
"""How bytes are read; bf16 as its bits, widened by `read_floats`."""
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    path: Path
    kind: str
    """As the file names it: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    offset_bytes: int
    """From the beginning of the file."""

    def read(self) -> NDArray[Any]:
        """The numbers as stored."""
        dtype = np.dtype(_TYPES[self.kind])
        size = math.prod(self.shape) * dtype.itemsize
        # Memory of its own, not malloc's, which keeps up to 50 MB of what large arrays leave behind.
        memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with self.path.open("rb", buffering=0) as file, memoryview(memory) as view:
            file.seek(self.offset_bytes)
            done = 0
            while done < size:
                count = file.readinto(view[done:size])
                if not count:
                    raise ArtifactError(f"{self.path} ends early", why="it was cut while it was read", fix=ANEW)
                done += count
        return np.frombuffer(memory, dtype, math.prod(self.shape)).reshape(self.shape)

    def read_floats(self) -> NDArray[np.float32]:
        """The numbers of a floating type as fp32."""
        assert self.kind in FLOATING
        stored = self.read()
        if self.kind == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name. ArtifactError where a file is missing or its header lies."""
    if (folder / WEIGHTS).exists() or not (folder / SHARDS).exists():
        return open_tensor_file(folder / WEIGHTS)
    return {name: tensor for shard in shard_names(folder) for name, tensor in open_tensor_file(folder / shard).items()}


def shard_names(folder: Path) -> list[str]:
    """The files that the index names, beside it."""
    try:
        shards = sorted(set(json.loads((folder / SHARDS).read_text(encoding="utf-8"))["weight_map"].values()))
        assert all(isinstance(name, str) and Path(name).name == name for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        why = "it must map tensors to file names beside it"
        raise ArtifactError(f"{folder / SHARDS} is damaged", why=why, fix="name a complete checkpoint") from None
    return shards


def open_tensor_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name. ArtifactError where it is missing or its header lies."""
    assert sys.byteorder == "little", "the format is; no machine we know is not"
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="name a complete checkpoint") from None
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged", why=str(error), fix=ANEW) from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
