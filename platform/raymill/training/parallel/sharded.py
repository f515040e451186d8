"""Fully sharded weights (ZeRO-3; Rajbhandari et al. 2020) by torch's FSDP2: each block whole only while it runs.

Weights, gradients and optimizer state are split by rows over the workers of `shard`; hsdp sums the gradients over
`copies` besides. Each microbatch gathers every block twice; gradients are reduced once per step, and summed over the
microbatches in whole blocks until then.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from raymill.training.parallel.mesh import Grid


def shard(root: nn.Module, blocks: list[nn.Module], grid: Grid, half: bool) -> None:
    """Shards each block by itself and the rest of `root` together; half: bf16 while it runs, fp32 sums of gradients."""
    axes = ("copies", "shard") if grid.layout.data == "hsdp" else ("shard",)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    for module in [*blocks, root]:
        fully_shard(module, mesh=grid.mesh[axes], mp_policy=policy or MixedPrecisionPolicy())
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are divided by the targets of the whole step
        module.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing while it sums


def reduce_at_the_end(root: nn.Module, last: bool) -> None:
    """Whether the coming backward is the step's last, after which gradients are reduced."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
