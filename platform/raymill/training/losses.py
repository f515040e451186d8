"""Objectives: what a batch is judged by. Each is made of a batch's targets and given to the model's forward."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from raymill.dataset.loader import IGNORE
from raymill.model.transformer import Objective


def next_token(targets_BT: Tensor) -> Objective:
    """The summed cross-entropy in nats over the targets that are not IGNORE, in float32 whatever the model's type.

    0, with gradients of 0, when there is none.
    """

    def objective(x_BTD: Tensor, head: nn.Linear) -> Tensor:
        logits_NV = head(x_BTD).flatten(0, 1).float()
        return functional.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")

    return objective
