"""Which matrices of a block read one input: a step multiplies them as one, and an adapter adds to each by its name.

In: a model's shape. Out: the four joins that every block has, and by a matrix's name where it stands in them. Both steps
and the reader of adapters go by it.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig

JoinName = Literal["qkv", "out", "up", "down"]


@dataclass(frozen=True)
class Join:
    """Matrices of a block that read one input, one below the other."""

    name: JoinName
    matrices: tuple[str, ...]
    """Their names in the block."""
    rows: tuple[int, ...]
    """N of each."""
    columns: int
    """K."""
    bias: bool


@dataclass(frozen=True)
class Place:
    """Where a matrix stands."""

    layer: int
    join: Join
    first: int
    """Its first row in the join."""
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows, self.join.columns


def joins(config: ModelConfig) -> tuple[Join, ...]:
    """The joins of every block, in the order in which it computes them."""
    dim, hidden, width = config.model_dim, config.hidden_dim, config.head_width
    queries, keys = config.num_heads * width, config.num_kv_heads * width
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    up = ("mlp.gate_proj", "mlp.up_proj") if config.gated else ("mlp.up_proj",)
    return (
        Join("qkv", qkv, (queries, keys, keys), dim, config.qkv_bias),
        Join("out", ("self_attn.o_proj",), (dim,), queries, config.output_bias),
        Join("up", up, (hidden,) * len(up), dim, not config.gated),
        Join("down", ("mlp.down_proj",), (dim,), hidden, not config.gated),
    )


def places(config: ModelConfig) -> dict[str, Place]:
    """Every matrix of the blocks by its name, `model.layers.0.self_attn.q_proj`."""
    found = {}
    for layer in range(config.num_layers):
        for join in joins(config):
            first = 0
            for name, rows in zip(join.matrices, join.rows, strict=True):
                found[f"model.layers.{layer}.{name}"] = Place(layer, join, first, rows)
                first += rows
    return found


def not_in_blocks(name: str) -> ArtifactError:
    """An adapter adds to what is no matrix of the blocks."""
    why = "only the matrices of attention and feed-forward can be added to"
    return ArtifactError(f"an adapter adds to {name}", why=why, fix="train the adapter without it")
