"""The layout ddp: every worker holds the whole model; only gradients travel, in the order of parallel/reduction.py.

Whatever the number of workers, a step gives the same bits: every microbatch is computed alone, its dropout is drawn from
(seed, step, microbatch), and gradients and losses are added along one tree. That holds where the backward pass itself
is repeatable: on CPUs with the same number of threads. On GPUs it is not (attention adds as its threads come), so a
tolerance stands there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymill.dataset.loader import Batch
from raymill.training.config import TrainingConfig
from raymill.training.parallel.microbatch import backward_microbatch
from raymill.training.parallel.reduction import Reduction, run_of, sum_scalars
from raymill.training.parallel.worker import Worker


class Replicated:
    """A Placement: the whole model on every worker."""

    def __init__(self, model: nn.Module, worker: Worker, config: TrainingConfig) -> None:
        self.tolerance = self.tolerance_on(worker.device)
        self.model = model
        self._worker = worker
        self._config = config
        self._count = config.num_microbatches
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._reduction = Reduction(self._parameters, worker.rank, worker.world_size, self._count)

    @staticmethod
    def tolerance_on(device: torch.device) -> float:
        """On GPUs that of bf16 in parallel/composed.py; not measured there."""
        return 0.0 if device.type == "cpu" else 2e-3

    def microbatches(self) -> range:
        return run_of(self._worker.rank, self._worker.world_size, self._count)

    def backward(self, batches: Iterator[Batch], learned: int, step: int) -> Tensor:
        # -0.0 is what changes no number it is added to, 0.0 included.
        losses = torch.full((self._count,), -0.0, device=self._worker.device)

        def leaf(number: int) -> None:
            batch = next(batches)
            losses[number] = backward_microbatch(
                self.model, batch, self._config, self._worker.device, learned=learned, step=step, number=number
            )

        self._reduction.sum(leaf)
        if self._worker.world_size > 1:
            dist.all_reduce(losses)
        return sum_scalars(losses)

    def gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def place(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        return whole.to(like.device)
