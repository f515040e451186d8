"""Unstructured pruning: the least important weights of every matrix inside the blocks become zero, in place.

magnitude takes the smallest of each matrix. wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
Language Models") counts a weight by its size times the norm of the input it meets, compares inside each output channel,
and measures a block's inputs behind the blocks pruned already. Embedding and head stay whole.

Files keep their size and dense products their speed: zeros alone pay in formats that know them.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from raymill.compression.calibrate import Calibration, Walk, readers
from raymill.model.transformer import Block, Transformer


@torch.no_grad()
def prune_by_magnitude(model: Transformer, share: float) -> None:
    """Zeroes the smallest `share` of each matrix."""
    for block in cast("list[Block]", model.model.layers):
        for part, names in readers(block):
            for name in names:
                weight_NK = getattr(part, name).weight
                weight_NK.view(-1)[_least(weight_NK.abs().view(1, -1), share)[0]] = 0.0


@torch.no_grad()
def prune_by_wanda(model: Transformer, share: float, calibration: Calibration) -> None:
    """Zeroes `share` of each output channel: the weights with the least |weight| x norm of their input."""
    walk = Walk(model, calibration)
    for block in cast("list[Block]", model.model.layers):
        for part, names in readers(block):
            norm_K = walk.moments(block, getattr(part, names[0])).diagonal().sqrt().float()
            for name in names:
                weight_NK = cast(nn.Linear, getattr(part, name)).weight
                weight_NK.scatter_(1, _least(weight_NK.abs() * norm_K, share), 0.0)
        walk.advance(block)


def _least(scores_RC: Tensor, share: float) -> Tensor:
    """Columns of the lowest `share` of each row's scores."""
    return scores_RC.argsort(dim=1, stable=True)[:, : int(share * scores_RC.shape[1])]
