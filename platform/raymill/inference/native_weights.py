"""A checkpoint's weights by Llama's names, checked, for the native step. numpy only.

In: a folder. Out: what config.json says, and a way to read each matrix and vector, one at a time. Names, shapes, types and
scales are checked before a number is used, as compression/quantize.py and model/weights.py check them for torch.

Shapes: N output channels, K input channels, G group size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymill.compression.format import HEAD_INPUT_SCALE, Quantization, read_quantization
from raymill.errors import ArtifactError
from raymill.inference.step import Floats
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, WEIGHTS, read_config, read_model_config
from raymill.model.gpt2_layout import gpt2_rows
from raymill.model.tensor_file import FLOATING, StoredTensor, open_tensors

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
POSITIONS = "model.embed_positions.weight"


@dataclass(frozen=True)
class StoredMatrix:
    """Rows of a matrix as pack() of native/matmul.h takes them."""

    precision: int
    """0 fp32, 1 int8, 2 int4."""
    group_size: int
    """int4 alone, else 0."""
    weight: NDArray[Any]
    scale: NDArray[Any] | None
    """fp32 (N) or fp16 (N, K/G); None for fp32."""
    columns: int

    @property
    def rows(self) -> int:
        return len(self.weight)


@dataclass(frozen=True)
class _Place:
    """A tensor of ours in the files; gpt2's are transposed, or a third of one."""

    stored: StoredTensor
    transposed: bool = False
    part: int = 0
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.stored.shape[::-1] if self.transposed else self.stored.shape
        return (shape[0] // self.parts, *shape[1:]) if shape else ()

    def floats(self) -> Floats:
        whole = self.stored.read_floats()
        whole = whole.T if self.transposed else whole
        return np.ascontiguousarray(np.split(whole, self.parts)[self.part])


class CheckpointWeights:
    """ArtifactError, from making one and from every method, names the first tensor that does not fit config.json."""

    def __init__(self, folder: Path) -> None:
        self.config, self.vocab_size = read_model_config(folder)
        self.quantization: Quantization | None = read_quantization(read_config(folder), str(folder / CONFIG))
        self._folder = folder
        stored = open_tensors(folder)
        if self.config.architecture == "gpt2" and self.quantization is None:
            self._places = _gpt2_places(self.config, stored)
        else:
            self._places = {name: _Place(tensor) for name, tensor in stored.items()}
        self._unread = set(self._places)

    def check_all_read(self) -> None:
        """What the step did not ask for, the model may not have; but some store a tied head, or angles."""
        for name in sorted(self._unread):
            tied = self.config.tie_embeddings and name.startswith(f"{HEAD}.")
            if not tied and not name.endswith("rotary_emb.inv_freq"):
                raise self._mismatch(f"{name} is no part of {self.config.architecture}")

    def vector(self, name: str, *shape: int) -> Floats:
        """A tensor that is never quantized, fp32."""
        place = self._find(name, shape)
        if place.stored.kind not in FLOATING:
            raise self._mismatch(f"{name} is {place.stored.kind}, not a floating type")
        return place.floats()

    def head_input_scale(self) -> Floats | None:
        """What hidden states are multiplied by on their way out; None where nothing was smoothed."""
        if self.quantization is None or self.config.tie_embeddings or HEAD_INPUT_SCALE not in self._places:
            return None
        return self._scales(HEAD_INPUT_SCALE, "F32", self.config.model_dim)

    def matrix(self, names: tuple[str, ...], rows: tuple[int, ...], columns: int) -> StoredMatrix:
        """Matrices of one input one below the other; `names` without `.weight`."""
        parts = [self._one_matrix(name, count, columns) for name, count in zip(names, rows, strict=True)]
        if len(parts) == 1:
            return parts[0]
        scales = [part.scale for part in parts if part.scale is not None]
        joined = np.concatenate([part.weight for part in parts])
        return replace(parts[0], weight=joined, scale=np.concatenate(scales) if scales else None)

    def _one_matrix(self, name: str, rows: int, columns: int) -> StoredMatrix:
        if self.quantization is None:
            return StoredMatrix(0, 0, self.vector(f"{name}.weight", rows, columns), None, columns)
        if self.quantization.method == "int8" or name in (EMBEDDING, HEAD):
            weight = self._integers(f"{name}.weight", "I8", rows, columns)
            scale = self._scales(f"{name}.weight_scale", "F32", rows, 1)
            return StoredMatrix(1, 0, weight, scale.reshape(rows), columns)
        group = self.quantization.group_size
        if columns % group:
            raise self._mismatch(f"{name} has {columns} columns, no whole number of groups of {group}")
        weight = self._integers(f"{name}.weight", "U8", rows, columns // 2)
        return StoredMatrix(
            2, group, weight, self._scales(f"{name}.weight_scale", "F16", rows, columns // group), columns
        )

    def _integers(self, name: str, kind: str, *shape: int) -> NDArray[Any]:
        place = self._find(name, shape)
        if place.stored.kind != kind:
            raise self._mismatch(f"{name} is {place.stored.kind}, not {kind}")
        return place.stored.read()

    def _scales(self, name: str, kind: str, *shape: int) -> NDArray[Any]:
        scale = self._integers(name, kind, *shape)
        if not bool(np.isfinite(scale).all()):
            raise self._mismatch(f"{name} is not finite")
        return scale

    def _find(self, name: str, shape: tuple[int, ...]) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise self._mismatch(f"there is no {name}")
        if place.shape != shape:
            raise self._mismatch(f"{name} is {place.shape}, not {shape}")
        self._unread.discard(name)
        return place

    def _mismatch(self, why: str) -> ArtifactError:
        where = self._folder / WEIGHTS
        return ArtifactError(f"{where} does not match {CONFIG}", why=why, fix="name a complete checkpoint")


def _gpt2_places(config: ModelConfig, stored: dict[str, StoredTensor]) -> dict[str, _Place]:
    """Ours by their place in gpt2's own layout. Old files have no prefix, and masks among the weights."""
    rest = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    places = {}
    for theirs, ours, transposed in gpt2_rows(config):
        if theirs in rest:
            tensor = rest.pop(theirs)
            places.update({name: _Place(tensor, transposed, part, len(ours)) for part, name in enumerate(ours)})
    masks = (".attn.bias", ".attn.masked_bias")
    return places | {name: _Place(tensor) for name, tensor in rest.items() if not name.endswith(masks)}
