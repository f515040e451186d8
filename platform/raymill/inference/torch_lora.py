"""LoRA adapters in the torch step: which rows of a step have one, and what it adds to a product of theirs.

Matrices that read one input are joined (torch_step.py), so an adapter's parts are too: the A of one join stand above each
other, each B behind its own columns. An adapter costs two small fp32 products per join, for its rows only.

Shapes: M rows, K input channels, N output channels, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymill.errors import ArtifactError
from raymill.inference.step import Chunk, Floats

JOINS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Place = tuple[int, str]
"""A layer and a join of its matrices."""


class Lora:
    """One adapter: (A (r, K), B (N, r)) by place, the scale already in B."""

    def __init__(
        self,
        tensors: dict[str, tuple[Floats, Floats]],
        scale: float,
        widths: dict[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        """widths: output channels of each matrix of a join, 0 where the architecture has none."""
        left = dict(tensors)
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
        self.parts: dict[Place, tuple[Tensor, Tensor]] = {}
        for layer in sorted(layers):
            for join, names in JOINS.items():
                found = [left.pop(f"model.layers.{layer}.{name}", None) for name in names]
                if any(found):
                    a_rK = torch.cat([torch.tensor(pair[0]) for pair in found if pair])
                    blocks = [
                        torch.tensor(p[1]) if p else torch.zeros(n, 0) for p, n in zip(found, widths[join], strict=True)
                    ]
                    self.parts[layer, join] = (a_rK.to(device), (torch.block_diag(*blocks) * scale).to(device))
        if left:
            why = "only the matrices of attention and feed-forward can be added to"
            raise ArtifactError(f"an adapter adds to {next(iter(left))}", why=why, fix="train the adapter without it")


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
