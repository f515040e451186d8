"""Objectives: what a batch is judged by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from raymill.dataset.loader import IGNORE


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not IGNORE, in float32 whatever the logits' type.

    NaN when there is none: who calls it knows.
    """
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE)
