"""Everything a step changes: weights, optimizer state, the running mean. Whole tensors go out to files and come back.

What a worker holds of it is the layout's business (parallel/placement.py); files are the same whatever the layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from raymill.model.files import WEIGHTS
from raymill.model.transformer import Transformer
from raymill.training.checkpoint import EMA, OPTIMIZER, Files
from raymill.training.config import TrainingConfig
from raymill.training.ema import Ema
from raymill.training.optimizer import build_optimizer, set_learning_rate
from raymill.training.parallel.choice import placement_for
from raymill.training.parallel.worker import Worker


class TrainingState:
    """One worker's part of a run's state."""

    def __init__(self, config: TrainingConfig, model: Transformer, worker: Worker) -> None:
        """Every worker brings the whole model with the same bits; it is laid out in place."""
        self._config = config
        self.placement = placement_for(config, model, worker)
        same = worker.world_size > 1 and config.layout.data == "ddp" and config.layout.model_size == 1
        self._optimizer = build_optimizer(self.placement.model, config.optimizer, dist.group.WORLD if same else None)
        self.updates = 0
        """Steps that changed the weights: all that no guard skipped."""
        self._parameters = dict(self.placement.model.named_parameters())
        self._ema = Ema(self.placement.model, config.ema_decay) if config.ema_decay is not None else None

    @torch.no_grad()
    def update(self, scale: float, gradient_norm: float) -> None:
        """Changes the weights by the gradients there are, at this fraction of the peak learning rate."""
        limit = self._config.optimizer.clip_norm
        if limit is not None and gradient_norm > limit:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / gradient_norm)
        self.updates += 1
        set_learning_rate(self._optimizer, scale)
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update(self.updates)

    def forget_gradients(self) -> None:
        self._optimizer.zero_grad()

    def files(self) -> Files:
        """Whole tensors by file, on rank 0. Every worker calls it; the tensors may be those in use."""
        gather = self.placement.gather
        files = {WEIGHTS: gather(self._parameters), OPTIMIZER: gather(self._optimizer_tensors())}
        if self._ema is not None:
            files[EMA] = gather(self._ema.tensors())
        return files

    def published(self) -> dict[str, Tensor]:
        """The whole weights that are validated: the running mean, where there is one. As `files`."""
        return self.placement.gather(self._parameters if self._ema is None else self._ema.tensors())

    def load(self, files: Files, updates: int) -> None:
        """Puts optimizer state and running mean back, bit for bit. The model was built with its weights."""
        self.updates = updates
        for key, whole in files[OPTIMIZER].items():
            field, _, name = key.partition("/")
            if name in self._parameters:  # a stage of a pipeline holds some of them
                parameter = self._parameters[name]
                self._optimizer.state[parameter][field] = self.placement.place(name, whole, parameter)
        if self._ema is not None:
            means = self._ema.tensors()
            self._ema.load({name: self.placement.place(name, files[EMA][name], like) for name, like in means.items()})

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{field}/{name}": tensor
            for name, parameter in self._parameters.items()
            for field, tensor in self._optimizer.state.get(parameter, {}).items()
        }
