"""One model step over a slotted KV cache: chunks of ids in, the logits after each finished chunk out.

Every row of a step is (id, slot, position). The matrices see all rows of all sequences at once; only attention looks at
who is who: all single rows (completions) in one call, every longer chunk (a piece of a prompt) in its own, over the keys
its window reaches. Works for every architecture, full-precision and int8 checkpoints alike. `ModelStep` is the seam:
another step, in native code, serves the same engine.

Cost on one core (4 layers of 256, vocabulary 4,096), single row: about 1 ms, most of it in torch's dispatch.

Shapes: M rows, R single rows, D model_dim, H num_heads, K num_kv_heads, G = H / K, C head_dim, T positions, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from raymill.compression.quantize import Int8Linear
from raymill.inference.kv_cache import KvCache
from raymill.inference.scheduler import Chunk
from raymill.model.config import ModelConfig
from raymill.model.rope import rotate
from raymill.model.transformer import (
    Attention,
    Block,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    NormedRotaryAttention,
    RMSNorm,
    Transformer,
)


class ModelStep(Protocol):
    """What the engine needs of a model."""

    vocab_size: int
    max_seq_len: int
    num_slots: int

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Writes the chunks' keys and values and returns logits (n, V), a row for each chunk that wants them."""
        ...


class TorchStep:
    """The step in plain torch."""

    def __init__(self, model: Transformer, num_slots: int) -> None:
        self.vocab_size = model.vocab_size
        self.max_seq_len = model.config.max_seq_len
        self.num_slots = num_slots
        self._config = model.config
        self._device = model.cos_TC.device
        self._cache = KvCache(model.config, num_slots, self._device)
        self._model = model.eval()
        self._layers = [_Layer.of(cast(Block, block), model.config) for block in model.model.layers]
        self._norm = _norm(model.model.norm)

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        rows = _Rows.of(chunks, self._device)
        cos, sin = self._model.cos_TC[rows.positions, None], self._model.sin_TC[rows.positions, None]
        groups = _attention_groups(chunks, self._config.sliding_window, self._device)
        x_MD = self._model.model.embed_tokens(rows.ids)
        if self._model.model.embed_positions is not None:
            x_MD = x_MD + self._model.model.embed_positions(rows.positions)
        for index, layer in enumerate(self._layers):
            y = self._attend(index, layer, layer.qkv(layer.attention_norm(x_MD)), rows, groups, cos, sin)
            x_MD = x_MD + layer.out(y)
            x_MD = x_MD + layer.feed_forward(layer.feed_forward_norm(x_MD))
        logits: Tensor = self._model.lm_head(self._norm(x_MD[rows.wanted]))
        return logits

    def _attend(
        self,
        index: int,
        layer: _Layer,
        qkv: Tensor,
        rows: _Rows,
        groups: list[_Singles | _Piece],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Attention output (M, H x C) from the joined projections of every row."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
        turned = layer.turn(qkv[:, : heads + kv_heads], cos, sin)
        kv = torch.cat([turned[:, heads:], qkv[:, heads + kv_heads :]], dim=1)
        self._cache.write(index, rows.slots, rows.positions, kv)
        q = turned[:, :heads].unflatten(1, (kv_heads, -1))  # (M, K, G, C): the queries that share a key
        outputs = [group.attend(q[group.rows], *self._cache.read(index, group.slots, group.seen)) for group in groups]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


@dataclass(frozen=True)
class _Rows:
    ids: Tensor
    slots: Tensor
    positions: Tensor
    wanted: Tensor
    """Rows whose logits are asked for."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device) -> _Rows:
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            ids += chunk.ids
            slots += [chunk.slot] * len(chunk.ids)
            positions += range(chunk.start, chunk.start + len(chunk.ids))
            if chunk.wants_logits:
                wanted.append(len(ids) - 1)
        packed = torch.tensor([ids, slots, positions], device=device)
        return cls(packed[0], packed[1], packed[2], torch.tensor(wanted, dtype=torch.int64, device=device))


class _Singles:
    """The single rows: one query position each, over the keys of its sequence that it sees."""

    def __init__(self, first: int, chunks: Sequence[Chunk], window: int | None, device: torch.device) -> None:
        slots = [chunk.slot for chunk in chunks]
        starts = [chunk.start for chunk in chunks]
        lengths = torch.tensor(starts, device=device) + 1
        length = max(starts) + 1
        self.rows = slice(first, first + len(chunks))
        self.seen = slice(_first_seen(min(starts), window), length)
        top = max(slots) + 1
        self._places: Tensor | None = None
        self.slots: slice | Tensor = slice(0, top)
        if slots == list(range(top)):
            pass  # the usual case: rows lie as the cache does
        elif top <= 2 * len(slots):
            # Cheaper to attend for a few idle slots than to copy the others' keys.
            self._places = torch.tensor(slots, device=device)
            lengths = torch.full((top,), length, device=device).index_put_((self._places,), lengths)
        else:
            self.slots = torch.tensor(slots, device=device)
        self._mask: Tensor | None = None
        if len(lengths) > 1:
            positions = torch.arange(self.seen.start, length, device=device)
            seen = positions < lengths[:, None]
            if window is not None:
                seen &= positions >= lengths[:, None] - window
            self._mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)[:, None, None]

    def attend(self, q_RKGC: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._places is None:
            return functional.scaled_dot_product_attention(q_RKGC, k, v, attn_mask=self._mask)
        spread = q_RKGC.new_zeros(len(k), *q_RKGC.shape[1:])
        spread[self._places] = q_RKGC
        return functional.scaled_dot_product_attention(spread, k, v, attn_mask=self._mask)[self._places]


class _Piece:
    """A chunk of several rows of one sequence: causal among themselves, over everything before that they see."""

    def __init__(self, first: int, chunk: Chunk, window: int | None, device: torch.device) -> None:
        self.rows = slice(first, first + len(chunk.ids))
        self.slots: slice | Tensor = slice(chunk.slot, chunk.slot + 1)
        self.seen = slice(_first_seen(chunk.start, window), chunk.start + len(chunk.ids))
        last_seen = torch.arange(chunk.start, self.seen.stop, device=device)[:, None]
        positions = torch.arange(self.seen.start, self.seen.stop, device=device)
        self._seen = positions <= last_seen
        if window is not None:
            self._seen &= positions > last_seen - window

    def attend(self, q_TKGC: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q_TKGC.permute(1, 2, 0, 3).flatten(0, 1)[None]  # (1, H, T, C)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self._seen, enable_gqa=True)
        grouped: Tensor = y[0].transpose(0, 1).unflatten(1, q_TKGC.shape[1:3])
        return grouped


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position + 1 - window)


def _attention_groups(chunks: Sequence[Chunk], window: int | None, device: torch.device) -> list[_Singles | _Piece]:
    """Single rows first, as the scheduler plans them; then one group per longer chunk."""
    singles = 0
    while singles < len(chunks) and len(chunks[singles].ids) == 1:
        singles += 1
    groups: list[_Singles | _Piece] = [_Singles(0, chunks[:singles], window, device)] if singles else []
    first = singles
    for chunk in chunks[singles:]:
        groups.append(_Piece(first, chunk, window, device))
        first += len(chunk.ids)
    return groups


@dataclass(frozen=True)
class _Layer:
    """A block with the projections of one input joined into one matrix."""

    attention_norm: Callable[[Tensor], Tensor]
    qkv: nn.Module
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Queries and keys of every row (M, H + K, C) to what meets, by the rows' cosines and sines (M, 1, C)."""
    out: nn.Module
    feed_forward_norm: Callable[[Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, block: Block, config: ModelConfig) -> _Layer:
        attention = block.self_attn
        return cls(
            _norm(block.input_layernorm),
            _join(attention.q_proj, attention.k_proj, attention.v_proj),
            _turn(attention, config),
            attention.o_proj,
            _norm(block.post_attention_layernorm),
            _feed_forward(block.mlp),
        )


def _norm(norm: RMSNorm | LayerNorm) -> Callable[[Tensor], Tensor]:
    """Torch's own operation: for the few rows of a step, calling a compiled loop costs more than running it saves."""
    if isinstance(norm, LayerNorm):
        return norm
    return partial(functional.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.eps)


def _turn(attention: Attention, config: ModelConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How this attention makes queries and keys meet, for both at once."""
    if not config.rotary:
        return lambda qk, cos, sin: qk
    if not isinstance(attention, NormedRotaryAttention):
        return rotate
    queries, keys = attention.q_norm.weight, attention.k_norm.weight
    gains = torch.cat([queries.expand(config.num_heads, -1), keys.expand(config.num_kv_heads, -1)])
    width, eps = config.head_width, config.norm_eps
    return lambda qk, cos, sin: rotate(functional.rms_norm(qk, (width,), eps=eps).mul_(gains), cos, sin)


def _feed_forward(mlp: FeedForward | GatedFeedForward) -> Callable[[Tensor], Tensor]:
    down = mlp.down_proj
    if isinstance(mlp, GatedFeedForward):
        gate_up = _join(mlp.gate_proj, mlp.up_proj)
        return lambda x_MD: down(_swiglu(*gate_up(x_MD).chunk(2, dim=-1)))
    up = mlp.up_proj
    return lambda x_MD: down(functional.gelu(up(x_MD), approximate="tanh"))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate).mul_(up)


def _join(*layers: nn.Linear | Int8Linear) -> nn.Module:
    """One layer whose output is the others' outputs side by side."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    scales = [layer.weight_scale for layer in layers if isinstance(layer, Int8Linear)]
    if scales:
        return Int8Linear(weight, torch.cat(scales), bias)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined
