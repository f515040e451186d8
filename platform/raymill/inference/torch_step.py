"""The step in plain torch: works for every architecture, precision and device, and is what native code is tested against.

Every row of a step is (id, slot, position). The matrices see all rows of all sequences at once; only attention looks at
who is who: all single rows (completions) in one call, every longer chunk (a piece of a prompt) in its own, over the keys
its window reaches, gathered from their pages.

On a GPU weights, keys and values may be fp16 or bf16, and steps of single rows are CUDA graphs (cuda_graphs.py). Logits are
handed on in fp32, but a half's product was rounded before: equal ones are more frequent. int8 and int4 run there with the
same integers, multiplied as fp32: right, and neither quicker nor smaller than fp32; fp16 and bf16 are what is made for it.

Not promised on a GPU: the same bits whatever the batch. Its libraries choose a product's kernel, and so the order of its
additions, by the number of rows, and a graph pads them; where two tokens are nearly as likely, text may depend on the
batch. No GPU path here has run on a GPU yet: what is tested is the arithmetic in halves, and what graphs record, on a CPU.

Cost on one core (4 layers of 256, vocabulary 4,096), single row: about 1 ms, most of it in torch's dispatch.

Shapes: M rows, R single rows, D model_dim, H num_heads, K num_kv_heads, G = H / K, C head_dim, T positions, V vocab_size,
P pages, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raymill.compression.int4 import Int4Linear
from raymill.compression.int8 import Int8Linear, quantize_rows
from raymill.inference.cuda_graphs import HEADER, DecodeGraphs
from raymill.inference.kv_cache import PAGE_TOKENS, KvPrecision, pages_for
from raymill.inference.step import Chunk, Floats, PageTable, StepOutput
from raymill.inference.torch_lora import Additions, Lora
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


class TorchStep:
    """`ModelStep` over a Transformer, full-precision or quantized, on the device where it lies."""

    def __init__(self, model: Transformer, num_pages: int, kv_precision: KvPrecision = "fp32") -> None:
        self.vocab_size = model.vocab_size
        self.max_seq_len = model.config.max_seq_len
        self.num_pages = num_pages
        self._config = model.config
        self._device = model.cos_TC.device
        self._dtype = model.model.norm.weight.dtype
        on_gpu = self._device.type == "cuda"
        pages = num_pages + on_gpu  # graphs pad their rows, which write to a page too
        self._cache_L = [
            _Cache(model.config, pages, kv_precision, self._dtype, self._device) for _ in range(model.config.num_layers)
        ]
        self._graphs = DecodeGraphs(self._decode, num_pages, self._device) if on_gpu else None
        model.eval()
        # Not the model itself: its single matrices are no longer needed where they are joined.
        self._embed_tokens, self._embed_positions = model.model.embed_tokens, model.model.embed_positions
        self._cos_TC, self._sin_TC, self._head = model.cos_TC, model.sin_TC, model.lm_head
        self._layers = [_Layer.of(cast(Block, block), model.config) for block in model.model.layers]
        self._norm = _norm(model.model.norm)
        self._adapters: list[Lora] = []

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> StepOutput:
        if self._graphs is not None and all(map(_decodes, chunks)):
            return StepOutput(self._graphs(chunks, table).cpu().numpy())
        rows = _Rows.of(chunks, table, self._device)
        groups = _attention_groups(chunks, table, self._config.sliding_window, self._dtype, self._device)
        x_MD = self._hidden(rows, groups, Additions(chunks, self._adapters, self._device))
        logits_NV = np.empty((0, self.vocab_size), np.float32)
        if len(rows.logits):
            logits_NV = self._head(self._norm(x_MD[rows.logits])).float().cpu().numpy()
        hidden_ND = self._outward(self._norm(x_MD[rows.hidden])) if len(rows.hidden) else None
        return StepOutput(logits_NV, hidden_ND)

    def _outward(self, x_ND: Tensor) -> Floats:
        """Hidden states as full precision has them: of a head that was smoothed the norm was changed."""
        scale_D = getattr(self._head, "input_scale", None)
        outward: Floats = (x_ND if scale_D is None else x_ND * scale_D).float().cpu().numpy()
        return outward

    def _decode(self, inputs_RX: Tensor) -> Tensor:
        """Logits of single rows, from one tensor (cuda_graphs.py), with nothing decided on the host."""
        ids, positions, pages, places = inputs_RX[:, :HEADER].unbind(1)
        rows = _Rows(ids, positions, pages, places, ids, ids)
        window = self._config.sliding_window
        group = _Group(slice(0, len(ids)), inputs_RX[:, HEADER:], 0, positions[:, None], window, self._dtype)
        x_RD = self._hidden(rows, [group], Additions((), (), self._device))
        logits: Tensor = self._head(self._norm(x_RD))
        return logits.float()

    def _hidden(self, rows: _Rows, groups: list[_Group], added: Additions) -> Tensor:
        """The residual stream of every row behind the last block."""
        cos, sin = self._cos_TC[rows.positions, None], self._sin_TC[rows.positions, None]
        x_MD: Tensor = self._embed_tokens(rows.ids)
        if self._embed_positions is not None:
            x_MD = x_MD + self._embed_positions(rows.positions)
        for index, layer in enumerate(self._layers):
            normed = layer.attention_norm(x_MD)
            qkv = added.add((index, "qkv"), normed, layer.qkv(normed))
            y = self._attend(index, layer, qkv, rows, groups, cos, sin)
            x_MD = x_MD + added.add((index, "out"), y, layer.out(y))
            normed = layer.feed_forward_norm(x_MD)
            inner = layer.activate(added.add((index, "up"), normed, layer.up(normed)))
            x_MD = x_MD + added.add((index, "down"), inner, layer.down(inner))
        return x_MD

    def load_adapter(self, tensors: dict[str, tuple[Floats, Floats]], scale: float) -> int:
        """See ModelStep. ArtifactError where a tensor belongs to no matrix of the blocks."""
        self._adapters.append(Lora(tensors, scale, self._config, self._device))
        return len(self._adapters)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        qkv: Tensor,
        rows: _Rows,
        groups: list[_Group],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Attention output (M, H x C) from the joined projections of every row."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
        turned = layer.turn(qkv[:, : heads + kv_heads], cos, sin).to(qkv.dtype)
        cache = self._cache_L[index]
        cache.write(rows.pages, rows.places, torch.cat([turned[:, heads:], qkv[:, heads + kv_heads :]], dim=1))
        q = turned[:, :heads]
        outputs = [group.attend(q[group.rows], cache, kv_heads) for group in groups]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


class _Cache:
    """One layer's keys and values, (P, PAGE_TOKENS, 2K, C) in the model's type; int8 has a scale for each head's row.

    Scales are fp32 under half weights too: in bf16 the largest of a row may come out as 128 of them, which int8 takes
    for -128, and fp16 has no smallest scale for a row of zeros.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, precision: KvPrecision, dtype: torch.dtype, device: torch.device
    ) -> None:
        # zeros, not empty: attention multiplies what no one wrote yet by zero, and NaN times zero is NaN.
        shape = (num_pages, PAGE_TOKENS, 2 * config.num_kv_heads)
        whole = precision == "fp32"
        self._values = torch.zeros((*shape, config.head_width), dtype=dtype if whole else torch.int8, device=device)
        self._scales = None if whole else torch.zeros((*shape, 1), device=device)
        self._dtype = dtype

    def write(self, pages: Tensor, places: Tensor, kv: Tensor) -> None:
        if self._scales is None:
            self._values[pages, places] = kv
        else:
            self._values[pages, places], self._scales[pages, places] = quantize_rows(kv.float())

    def read(self, pages: Tensor) -> Tensor:
        values = self._values[pages]
        return values if self._scales is None else (values * self._scales[pages]).to(self._dtype)


@dataclass(frozen=True)
class _Rows:
    ids: Tensor
    positions: Tensor
    pages: Tensor
    places: Tensor
    """Where in its page each row's key and value go."""
    logits: Tensor
    """Rows whose logits are asked for."""
    hidden: Tensor
    """Rows whose hidden state is."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk], table: PageTable, device: torch.device) -> _Rows:
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        logits: list[int] = []
        hidden: list[int] = []
        for chunk in chunks:
            first, count = len(ids), len(chunk.ids)
            ids += chunk.ids
            slots += [chunk.slot] * count
            positions += range(chunk.start, chunk.start + count)
            logits += range(first + count - chunk.num_logits, first + count)
            if chunk.wants_hidden:
                hidden += range(first, first + count)
        at = np.array(positions)
        pages = table[slots, at // PAGE_TOKENS]
        packed = torch.from_numpy(np.stack([ids, at, pages, at % PAGE_TOKENS])).to(device)
        wanted = (torch.tensor(each, dtype=torch.int64, device=device) for each in (logits, hidden))
        return cls(packed[0], packed[1], packed[2], packed[3], *wanted)


class _Group:
    """Rows that attend in one call: all single rows, or one longer chunk, causal among its own rows.

    Keys and values are copied out of their pages first: (sequences, K, positions, C).
    """

    def __init__(
        self, rows: slice, pages: Tensor, first_page: int, at: Tensor, window: int | None, dtype: torch.dtype
    ) -> None:
        """pages: (sequences, pages) from `first_page` on; at: the rows' positions (sequences, rows)."""
        self.rows, self._pages, self._shape = rows, pages, at.shape
        first, last = first_page * PAGE_TOKENS, (first_page + pages.shape[1]) * PAGE_TOKENS
        positions = torch.arange(first, last, device=pages.device)
        seen = positions <= at[..., None]
        if window is not None:
            seen &= positions > at[..., None] - window
        self._mask = torch.zeros(seen.shape, dtype=dtype, device=pages.device).masked_fill_(~seen, -torch.inf)[:, None]

    @classmethod
    def of(
        cls,
        first: int,
        chunks: Sequence[Chunk],
        table: PageTable,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Group:
        count = len(chunks[0].ids)
        starts = torch.tensor([chunk.start for chunk in chunks], device=device)
        first_page = 0
        if window is not None:
            first_page = max(0, min(chunk.start for chunk in chunks) + 1 - window) // PAGE_TOKENS
        last_page = pages_for(max(chunk.start for chunk in chunks) + count)
        pages = torch.from_numpy(table[[chunk.slot for chunk in chunks], first_page:last_page]).to(device)
        at = starts[:, None] + torch.arange(count, device=device)
        return cls(slice(first, first + len(chunks) * count), pages, first_page, at, window, dtype)

    def attend(self, q_RHC: Tensor, cache: _Cache, kv_heads: int) -> Tensor:
        kv = cache.read(self._pages).flatten(1, 2).transpose(1, 2)  # (sequences, 2K, positions, C)
        q = q_RHC.unflatten(0, self._shape).transpose(1, 2)  # (sequences, H, rows, C)
        k, v = kv[:, :kv_heads], kv[:, kv_heads:]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, enable_gqa=True)
        rows: Tensor = y.transpose(1, 2).flatten(0, 1)
        return rows


def _decodes(chunk: Chunk) -> bool:
    return len(chunk.ids) == chunk.num_logits == 1 and not chunk.adapter and not chunk.wants_hidden


def _attention_groups(
    chunks: Sequence[Chunk], table: PageTable, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[_Group]:
    """Single rows first, as the scheduler plans them; then one group per longer chunk."""
    singles = 0
    while singles < len(chunks) and len(chunks[singles].ids) == 1:
        singles += 1
    groups = [_Group.of(0, chunks[:singles], table, window, dtype, device)] if singles else []
    first = singles
    for chunk in chunks[singles:]:
        groups.append(_Group.of(first, [chunk], table, window, dtype, device))
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
    up: nn.Module
    activate: Callable[[Tensor], Tensor]
    down: nn.Module

    @classmethod
    def of(cls, block: Block, config: ModelConfig) -> _Layer:
        attention = block.self_attn
        return cls(
            _norm(block.input_layernorm),
            _join(attention.q_proj, attention.k_proj, attention.v_proj),
            _turn(attention, config),
            attention.o_proj,
            _norm(block.post_attention_layernorm),
            *_feed_forward(block.mlp),
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


def _feed_forward(mlp: FeedForward | GatedFeedForward) -> tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module]:
    if isinstance(mlp, GatedFeedForward):
        return _join(mlp.gate_proj, mlp.up_proj), _swiglu, mlp.down_proj
    return mlp.up_proj, partial(functional.gelu, approximate="tanh"), mlp.down_proj


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _join(*layers: nn.Linear | Int8Linear | Int4Linear) -> nn.Module:
    """One layer whose output is the others' outputs side by side."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    scales = [layer.weight_scale for layer in layers if not isinstance(layer, nn.Linear)]
    if scales:
        kind = Int4Linear if isinstance(layers[0], Int4Linear) else Int8Linear
        return kind(weight, torch.cat(scales), bias)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined
