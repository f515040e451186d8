"""This process's place among the training workers, and the wrapper that keeps their gradients equal.

Ray Train (or torchrun, or a test) has set up torch.distributed; a single process needs no set-up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Worker:
    """One of `world_size` data-parallel processes."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> Worker:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP, which averages gradients during backward; the model itself when alone."""
        return DistributedDataParallel(model) if self.world_size > 1 else model

    def without_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside it, backward keeps gradients local: for all microbatches but the last of a step."""
        if isinstance(wrapped, DistributedDataParallel):
            context: AbstractContextManager[None] = wrapped.no_sync()
            return context
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all workers."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        shared = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            dist.broadcast(shared, src=0)
        return int(shared)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
