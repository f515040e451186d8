"""LoRA adapters in the torch step: which rows of a step have one, and what it adds to a product of theirs.

Matrices that read one input are joined (torch_step.py), so an adapter's parts are too: the A of one join stand above each
other, each B behind its own columns. An adapter costs two small fp32 products per join, for its rows only.

Shapes: M rows, K input channels, N output channels, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymill.inference.joins import joins, not_in_blocks
from raymill.inference.step import Chunk, Floats
from raymill.model.config import ModelConfig

Place = tuple[int, str]
"""A layer and a join of its matrices, by name."""


class Lora:
    """One adapter: (A (r, K), B (N, r)) by place, the scale already in B."""

    def __init__(
        self, tensors: dict[str, tuple[Floats, Floats]], scale: float, config: ModelConfig, device: torch.device
    ) -> None:
        left = dict(tensors)
        self.parts: dict[Place, tuple[Tensor, Tensor]] = {}
        for layer in range(config.num_layers):
            for join in joins(config):
                found = [left.pop(f"model.layers.{layer}.{name}", None) for name in join.matrices]
                if any(found):
                    a_rK = torch.cat([torch.tensor(pair[0]) for pair in found if pair])
                    blocks = [
                        torch.tensor(p[1]) if p else torch.zeros(n, 0) for p, n in zip(found, join.rows, strict=True)
                    ]
                    self.parts[layer, join.name] = (a_rK.to(device), (torch.block_diag(*blocks) * scale).to(device))
        if left:
            raise not_in_blocks(next(iter(left)))


class Additions:
    """What the adapters of one step's chunks add."""

    def __init__(self, chunks: Sequence[Chunk], adapters: Sequence[Lora], device: torch.device) -> None:
        rows: dict[int, list[int]] = {}
        first = 0
        for chunk in chunks:
            if chunk.adapter:
                rows.setdefault(chunk.adapter, []).extend(range(first, first + len(chunk.ids)))
            first += len(chunk.ids)
        self._of = [(adapters[number - 1], torch.tensor(each, device=device)) for number, each in rows.items()]

    def add(self, place: Place, x_MK: Tensor, y_MN: Tensor) -> Tensor:
        for lora, rows in self._of:
            if place in lora.parts:
                a_rK, b_Nr = lora.parts[place]
                y_MN[rows] += (x_MK[rows].float() @ a_rK.T @ b_Nr.T).to(y_MN.dtype)
        return y_MN
