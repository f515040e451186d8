"""Causal attention for training and evaluation.

Document numbers never fall along T, so what a query sees is one range of keys: from the first of its document (or of its
window) to itself. On a CPU in fp32, attention runs over blocks of BLOCK queries as matrix products of the keys that some
query of the block sees: no scores above the diagonal's blocks, none before the first document that the block touches. The
softmax is one compiled pass over each row's range, so no mask is ever made. Forward and backward at 8 x 256 x 6
heads of 64 take 32 ms on one core, torch's flash kernel 38; seven eighths of it are the products.

Probabilities are made again for the backward pass from one number per row: 2 of those ms, for a sixth of what a block
kept. Groups of query heads share their keys: a group's queries are rows of one product, no key is copied. Blocks run in
one order, so gradients are the same bits every time.

Elsewhere (GPUs, other types, compilers) it is torch's scaled_dot_product_attention, with a mask only where there are
documents or a window.

Shapes: B batch, T sequence, H num_heads, K num_kv_heads (divides H), G query heads of a key head, C head_width, N = B K,
R query rows (positions x G), S keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raymill.model.kernels import array, is_plain, split_rows

BLOCK = 64
"""Queries of a block."""
_ALIGNED = 16
"""A block's first key is a multiple of this: whole cache lines, and products whose bits do not hang on the place."""


def attend(
    q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, *, documents_BT: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Scaled dot-product attention (B, T, H, C), scale 1 / sqrt(C).

    A position sees those before it and itself: with documents_BT (int64, never falling along T) only those of its own
    document number, with `window` only the last `window` of them, itself included.
    """
    if window is not None and window >= q_BTHC.shape[1]:
        window = None
    if is_plain(q_BTHC, k_BTKC, v_BTKC):
        y_BTHC: Tensor = _BlockAttention.apply(q_BTHC, k_BTKC, v_BTKC, documents_BT, window)
        return y_BTHC
    seen = (
        None if documents_BT is None and window is None else _mask(q_BTHC.shape[1], documents_BT, window, q_BTHC.device)
    )
    y_BHTC = functional.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BTKC.transpose(1, 2),
        v_BTKC.transpose(1, 2),
        attn_mask=seen,
        is_causal=seen is None,
        enable_gqa=q_BTHC.shape[2] != k_BTKC.shape[2],
    )
    return y_BHTC.transpose(1, 2)


def _mask(length: int, documents_BT: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Whether a query (second to last) sees a key (last): (T, T), or (B, 1, T, T) with documents."""
    at_T = torch.arange(length, device=device)
    seen_TT = at_T[:, None] >= at_T
    if window is not None:
        seen_TT = seen_TT & (at_T[:, None] - at_T < window)
    if documents_BT is None:
        return seen_TT
    return (seen_TT & (documents_BT[:, :, None] == documents_BT[:, None, :]))[:, None]


def first_seen(documents_BT: Tensor | None, window: int | None, batch: int, length: int) -> Tensor:
    """The first key that each query sees, int64 (B, T), never falling along T."""
    at_T = torch.arange(length)
    first_BT = torch.zeros(batch, length, dtype=torch.int64)
    if documents_BT is not None:
        begins_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
        first_BT[:, 1:] = torch.where(begins_BT, at_T[1:], 0).cummax(dim=1).values
    if window is not None:
        first_BT = torch.maximum(first_BT, at_T - (window - 1))
    return first_BT


class _Piece(NamedTuple):
    """One call of each product: some sequences, a block of queries, the keys from the first that any of them sees."""

    sequences: slice
    queries: slice
    keys: slice


def _pieces(first_BT: Tensor) -> list[_Piece]:
    """All sequences at once, or each by itself where documents let that skip a fifth of the keys or more."""
    batch, length = first_BT.shape
    blocks = [slice(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]
    starts_BM = first_BT[:, ::BLOCK] // _ALIGNED * _ALIGNED
    stops_M = torch.tensor([block.stop for block in blocks])
    shared_M = starts_BM.amin(0)
    together, alone = batch * int((stops_M - shared_M).sum()), int((stops_M - starts_BM).sum())
    if alone >= 0.8 * together:
        starts = shared_M.tolist()
        return [
            _Piece(slice(0, batch), block, slice(start, block.stop))
            for block, start in zip(blocks, starts, strict=True)
        ]
    return [
        _Piece(slice(b, b + 1), block, slice(start, block.stop))
        for b, starts in enumerate(starts_BM.tolist())
        for block, start in zip(blocks, starts, strict=True)
    ]


class _Layout(NamedTuple):
    """How queries and keys lie in memory for the products, and the softmax's words."""

    heads: int
    """Key heads K."""
    group: int
    """Query heads of a key head G."""
    scale: float
    first_BT: Tensor
    pieces: list[_Piece]

    def cuts(self) -> Iterator[tuple[_Piece, slice, slice]]:
        """Each piece, its matrices (N) and its rows of queries (R)."""
        for piece in self.pieces:
            sequences, queries = piece.sequences, piece.queries
            matrices = slice(sequences.start * self.heads, sequences.stop * self.heads)
            yield piece, matrices, slice(queries.start * self.group, queries.stop * self.group)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None, window: int | None
    ) -> Tensor:
        batch, length, heads, width = k_BTKC.shape
        group = q_BTHC.shape[2] // heads
        first_BT = first_seen(documents_BT, window, batch, length)
        layout = _Layout(heads, group, 1 / math.sqrt(width), first_BT, _pieces(first_BT))
        q_NRC, k_NTC, v_NTC = _gather(q_BTHC, heads), _gather(k_BTKC, heads), _gather(v_BTKC, heads)
        y_NRC = torch.empty_like(q_NRC)
        logs: list[Tensor] = []
        for piece, cut, rows in layout.cuts():
            p_NRS = torch.bmm(q_NRC[cut, rows], k_NTC[cut, piece.keys].transpose(1, 2))
            logs.append(_softmax(p_NRS, layout, piece, None))
            _product(p_NRS, v_NTC[cut, piece.keys], y_NRC[cut, rows])
        ctx.save_for_backward(q_NRC, k_NTC, v_NTC, *logs)
        ctx.layout = layout
        return _scatter(y_NRC, batch, heads, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        q_NRC, k_NTC, v_NTC, *logs = ctx.saved_tensors
        layout: _Layout = ctx.layout
        dy_NRC = _gather(dy_BTHC, layout.heads)
        dq_NRC, dk_NTC, dv_NTC = torch.empty_like(q_NRC), torch.zeros_like(k_NTC), torch.zeros_like(v_NTC)
        for (piece, cut, rows), logs_NR in zip(layout.cuts(), logs, strict=True):
            q, k, v, dy = q_NRC[cut, rows], k_NTC[cut, piece.keys], v_NTC[cut, piece.keys], dy_NRC[cut, rows]
            p_NRS = torch.bmm(q, k.transpose(1, 2))
            _softmax(p_NRS, layout, piece, logs_NR)
            dv_NTC[cut, piece.keys].baddbmm_(p_NRS.transpose(1, 2), dy)
            ds_NRS = torch.bmm(dy, v.transpose(1, 2))
            _softmax_backward(p_NRS, ds_NRS, layout.scale)
            _product(ds_NRS, k, dq_NRC[cut, rows])
            dk_NTC[cut, piece.keys].baddbmm_(ds_NRS.transpose(1, 2), q)
        batch = dy_BTHC.shape[0]
        dq_BTHC = _scatter(dq_NRC, batch, layout.heads, layout.group)
        return dq_BTHC, _scatter(dk_NTC, batch, layout.heads, 1), _scatter(dv_NTC, batch, layout.heads, 1), None, None


def _gather(x_BTHC: Tensor, heads: int) -> Tensor:
    """(B K, T G, C): a key head's queries beside each other, position by position."""
    batch, width = len(x_BTHC), x_BTHC.shape[-1]
    x_BKTGC: Tensor = x_BTHC.unflatten(2, (heads, -1)).transpose(1, 2)
    return x_BKTGC.reshape(batch * heads, -1, width)


def _scatter(x_NRC: Tensor, batch: int, heads: int, group: int) -> Tensor:
    """The inverse of _gather: (B, T, H, C)."""
    return x_NRC.view(batch, heads, -1, group, x_NRC.shape[-1]).transpose(1, 2).flatten(2, 3)


def _product(a_NRS: Tensor, b_NSC: Tensor, out_NRC: Tensor) -> None:
    """out = a b."""
    torch.baddbmm(out_NRC, a_NRS, b_NSC, beta=0, out=out_NRC)


def _softmax(scores_NRS: Tensor, layout: _Layout, piece: _Piece, logs_NR: Tensor | None) -> Tensor:
    """Makes probabilities of scores in place; with the logs of an earlier pass, the same ones again."""
    from raymill.model import loops

    scores, first = array(scores_NRS), array(layout.first_BT[piece.sequences])
    again = logs_NR is not None
    logs_NR = torch.empty(scores_NRS.shape[:2]) if logs_NR is None else logs_NR
    logs = array(logs_NR)
    loop = loops.softmax_again if again else loops.softmax
    heads, group, query, start = layout.heads, layout.group, piece.queries.start, piece.keys.start
    split_rows(
        (len(first), scores.size // len(first)),
        lambda i, j: loop(
            scores[i * heads : j * heads],
            first[i:j],
            query,
            start,
            heads,
            group,
            layout.scale,
            logs[i * heads : j * heads],
        ),
    )
    return logs_NR


def _softmax_backward(p_NRS: Tensor, dp_NRS: Tensor, scale: float) -> None:
    from raymill.model import loops

    p, dp = array(p_NRS), array(dp_NRS)
    split_rows(p.shape, lambda i, j: loops.softmax_backward(p[i:j], dp[i:j], scale))
