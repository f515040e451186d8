"""Context parallelism: every worker holds T / context positions of each sequence, for sequences too long for one.

All but attention works position by position. For attention, keys and values of all workers are gathered in each block,
and this worker's queries see those before them: exact, with document mask and window. A block costs one gathering of keys
and values forward and one scattered sum of their gradients backward; memory for them is that of the whole sequence, of
one block at a time for the gradients. The later slices see more keys, so the last worker has most to do.

Shapes: B batch, T positions of this worker, S positions of the sequence, H num_heads, K num_kv_heads, C head_width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class Gather(torch.autograd.Function):
    """The workers' slices (B, T, K, C), one after the other (B, S, K, C); back goes the sum of the slice's gradients."""

    @staticmethod
    def forward(ctx: Any, x_BTKC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        slices = [torch.empty_like(x_BTKC) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slices, x_BTKC.contiguous(), group=group)
        return torch.cat(slices, dim=1)

    @staticmethod
    def backward(ctx: Any, grad_BSKC: Tensor) -> tuple[Tensor, None]:
        slices = [part.contiguous() for part in grad_BSKC.chunk(dist.get_world_size(ctx.group), dim=1)]
        own = torch.empty_like(slices[0])
        dist.reduce_scatter(own, slices, group=ctx.group)
        return own, None


class GatheredAttention:
    """`attend` for one worker's slice of the queries; documents_BT are those of the keys up to the slice's end."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(
        self,
        q_BTHC: Tensor,
        k_BTKC: Tensor,
        v_BTKC: Tensor,
        *,
        documents_BT: Tensor | None = None,
        window: int | None = None,
        **settings: Any,
    ) -> Tensor:
        stop = (dist.get_rank(self._group) + 1) * q_BTHC.shape[1]
        k_BSKC, v_BSKC = Gather.apply(k_BTKC, self._group), Gather.apply(v_BTKC, self._group)
        return attend_last(q_BTHC, k_BSKC[:, :stop], v_BSKC[:, :stop], documents_BT, window)


def attend_last(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, documents_BS: Tensor | None, window: int | None
) -> Tensor:
    """Causal attention (B, T, H, C) of queries that are the last T of S positions."""
    length, first = k_BSKC.shape[1], k_BSKC.shape[1] - q_BTHC.shape[1]
    key_S = torch.arange(length, device=q_BTHC.device)
    query_T1 = key_S[first:, None]
    seen = key_S <= query_T1
    if window is not None:
        seen = seen & (key_S > query_T1 - window)
    if documents_BS is not None:
        seen = (seen & (documents_BS[:, first:, None] == documents_BS[:, None, :]))[:, None]
    y_BHTC = functional.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        attn_mask=seen,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return y_BHTC.transpose(1, 2)
