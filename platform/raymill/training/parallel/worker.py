"""This process's place among the training workers, and what they agree on.

Ray Train (or torchrun, or a test) has set up torch.distributed; a single process needs no set-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Worker:
    """One of `world_size` processes."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> Worker:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        shared = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            dist.broadcast(shared, src=0)
        return int(shared)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
