"""Muon (Jordan 2024): the momentum of a matrix, made orthogonal, is its update; AdamW for whatever is no matrix of a block.

In: gradients in `.grad`. Out: changed parameters. The update of a matrix is its Nesterov momentum with every singular
value moved near 1 by a polynomial of matrices (Newton-Schulz), in fp32: bf16 is 15 times slower on CPUs without AMX. An
update is scaled by 0.2 sqrt(longer side), which gives it the root mean square that AdamW's has (Moonshot 2025, "Muon is
Scalable for LLM Training"): one learning rate and one weight decay serve both.

An update depends on its matrix alone: on CPUs each is worked on by itself, so the bits are the same however many there
are and whichever worker does the work. Workers that hold the same matrices can share it out (`group`); sharded ones are
gathered, and each worker keeps its piece of the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from raymill.training.adamw import step_group
from raymill.training.orthogonal import cost, orthogonalize
from raymill.training.untraced import Untraced


class Muon(Untraced):
    """Groups with `method` muon hold matrices; those with adamw anything. Weight decay is decoupled in both.

    `group`: workers that hold the same matrices with the same gradients, and each do a part of the work.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})
        self._group = group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if group["method"] == "muon":
                self._orthogonal_step([matrix for matrix in group["params"] if matrix.grad is not None], group)
            else:
                step_group(group, self.state)

    def _orthogonal_step(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
            directions.append(_whole(matrix.grad.lerp(state["momentum"], group["momentum"])))
        for matrix, update in zip(matrices, self._shared_orthogonalize(directions), strict=True):
            scale = 0.2 * max(matrix.shape) ** 0.5
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(_piece(update, matrix), alpha=-group["lr"] * scale)

    def _shared_orthogonalize(self, directions: list[Tensor]) -> list[Tensor]:
        """Every worker does its part and gets those of the others."""
        if self._group is None or self._group.size() == 1:
            return orthogonalize(directions)
        parts = share_out([cost(*direction.shape) for direction in directions], self._group.size())
        own = parts[self._group.rank()]
        sent = directions[0].new_zeros(max(sum(directions[index].numel() for index in part) for part in parts))
        at = 0
        for update in orthogonalize([directions[index] for index in own]):
            sent[at : at + update.numel()].view_as(update).copy_(update)
            at += update.numel()
        received = sent.new_empty(len(parts) * len(sent))
        dist.all_gather_into_tensor(received, sent, group=self._group)
        updates: dict[int, Tensor] = {}
        for row, part in zip(received.view(len(parts), -1), parts, strict=True):
            at = 0
            for index in part:
                updates[index] = row[at : at + directions[index].numel()].view_as(directions[index])
                at += directions[index].numel()
        return [updates[index] for index in range(len(directions))]


def share_out(costs: Sequence[float], num_workers: int) -> list[list[int]]:
    """Which of the pieces of work each worker does: the dearest first, to whoever has least so far. Any may get none."""
    parts: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        worker = loads.index(min(loads))
        parts[worker].append(index)
        loads[worker] += costs[index]
    return parts


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which workers hold pieces. Each of them calls it."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _piece(whole: Tensor, like: Tensor) -> Tensor:
    """What this worker holds of a tensor that all have whole, laid out as `like`. Nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)
