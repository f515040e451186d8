"""Objectives: what a batch is judged by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, in float32 whatever the logits' type."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
