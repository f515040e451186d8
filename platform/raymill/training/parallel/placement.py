"""The seam between the loop and a layout: what one worker holds of the model, and how gradients become one.

`placement_for` (parallel/choice.py) builds the one that train.layout names. The loop knows nothing else of
layouts; the optimizer sees `model.parameters()`, whole tensors or DTensors alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from raymill.dataset.loader import Batch


class Placement(Protocol):
    """One model over the workers of a run."""

    model: nn.Module
    """What this worker holds. Its parameters' names are the whole model's; pipeline stages hold some of them."""
    tolerance: float
    """Largest difference of the loss, in nats, from a run of one worker; 0 where every bit is equal."""

    def microbatches(self) -> range:
        """The microbatches of every step, counted over all workers, whose sequences this worker reads."""
        ...

    def backward(self, batches: Iterator[Batch], learned: int, step: int) -> Tensor:
        """Runs this worker's microbatches of `step` (from 0) forward and backward; dropout depends on it.

        Leaves in `.grad` the gradient of the mean loss over the `learned` targets of the whole step; returns that loss,
        the same on every worker. `.grad` is empty before the first call and set to None by the loop after each step.
        """
        ...

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, the same bits on every worker."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of every worker's pieces (weights or optimizer state, by name). Rank 0 gets them all.

        Every worker calls it. Tensors may be those of the model: who keeps them copies.
        """
        ...

    def place(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """This worker's piece of a whole tensor, laid out as `like` (a parameter or a tensor of its optimizer state)."""
        ...
