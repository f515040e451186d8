"""Tensor parallelism (Shoeybi et al. 2019): every matrix of a block split over neighbours that share each activation.

q, k, v, gate and up are split by outputs, whole heads together; o and down by inputs, and their outputs summed: two sums
of (B, T, D) forward and two backward per block. These matrices are DTensors. All else is whole on every worker:

- Embedding, last norm and head work position by position, so each worker takes T / tensor positions of them: no work is
  done twice, and any objective runs as it is. Each worker's gradient is a part then, summed at the end of the step.
- The norms of q and k (Qwen 3) see this worker's heads only: parts, too.
- The norms of the residual stream and the biases of o and down see all, the same on every worker.

Shapes: B batch, T sequence, D model_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

SPLIT_BY_OUTPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
SPLIT_BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")

BRANCHES = {"self_attn": 3, "mlp": 0}
"""Arguments of each branch after its activations."""


def split_block(block: nn.Module, mesh: DeviceMesh) -> None:
    """Splits one block's matrices over a mesh of one axis, in place; every worker holds the whole block before."""
    present = {name for name, _ in block.named_modules()}
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in SPLIT_BY_OUTPUTS if name in present}
    plan |= {name: RowwiseParallel() for name in SPLIT_BY_INPUTS}
    for (
        branch,
        others,
    ) in BRANCHES.items():  # one tensor for all its readers: their gradients are summed before they travel
        layouts = (Replicate(), *[None] * others)
        plan[branch] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
    parallelize_module(block, mesh, plan, src_data_rank=None)


def sees_a_part(name: str) -> bool:
    """Whether the gradient of a whole parameter is this worker's part of it only."""
    return ".layers." not in name or "_norm." in name


def own_positions(length: int, group: dist.ProcessGroup) -> slice:
    """Of `length` positions, those this worker takes outside the blocks; the last worker takes what does not divide."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    share = length // size
    return slice(rank * share, length if rank == size - 1 else (rank + 1) * share)


class KeepOwnGradient(torch.autograd.Function):
    """x_BTD as it is; back goes the gradient of this worker's positions, zeros for the others."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, own: slice) -> Tensor:
        ctx.own = own
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        kept_BTD = torch.zeros_like(grad_BTD)
        kept_BTD[:, ctx.own] = grad_BTD[:, ctx.own]
        return kept_BTD, None


class TakeOwn(torch.autograd.Function):
    """This worker's positions of x_BTD; back goes the gradient of all positions, from all workers."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, own: slice, group: dist.ProcessGroup) -> Tensor:
        ctx.own, ctx.group, ctx.shape = own, group, x_BTD.shape
        return x_BTD[:, own].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole_BTD = grad.new_zeros(ctx.shape)
        whole_BTD[:, ctx.own] = grad
        dist.all_reduce(whole_BTD, group=ctx.group)  # zeros elsewhere, so no value is rounded
        return whole_BTD, None, None
