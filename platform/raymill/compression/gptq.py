"""GPTQ: rounding that makes up for itself (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization").

Columns are rounded one after the other, those with the largest inputs first (the paper's activation order); what rounding
one does to the layer's outputs is taken back by the columns not rounded yet, by their second moments with it. Scales are
given and stay: groups are of neighbouring columns, whatever the order of rounding. Weights that are zero stay zero, and
what that does is taken back like any rounding: pruning decided about them (as in Frantar and Alistarh 2023, "SparseGPT").

Cost: 2 K^3 for the inverse in fp64 and N K^2 for the updates: 0.2 s for 768 x 768, 1 s for 768 x 2,048 on one core.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: the paper's."""
_BLOCK = 128
"""Columns whose updates of the later ones are applied together; the paper's, for speed alone."""


def round_with_moments(weight_NK: Tensor, scale_NK: Tensor, moments_KK: Tensor, lowest: int, highest: int) -> Tensor:
    """Integers (N, K) in lowest..highest, so that they times scale_NK give about the outputs of weight_NK."""
    moments_KK = moments_KK.clone()
    diagonal_K = moments_KK.diagonal()
    silent_K = diagonal_K == 0  # inputs that are always zero: any weight does
    diagonal_K[silent_K] = 1.0
    diagonal_K += _DAMPING * diagonal_K.mean()
    order_K = diagonal_K.argsort(descending=True, stable=True)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(moments_KK[order_K][:, order_K]))
    factor_KK = torch.linalg.cholesky(inverse_KK, upper=True).to(weight_NK.dtype)
    weight_NK, scale_NK = weight_NK[:, order_K].clone(), scale_NK[:, order_K]
    zero_NK = weight_NK == 0
    values_NK = torch.empty_like(weight_NK)
    columns = weight_NK.shape[1]
    for first in range(0, columns, _BLOCK):
        stop = min(first + _BLOCK, columns)
        errors = torch.empty_like(weight_NK[:, first:stop])
        for column in range(first, stop):
            wanted_N, scale_N = weight_NK[:, column], scale_NK[:, column]
            values_N = (wanted_N / scale_N).round_().clamp_(lowest, highest).masked_fill_(zero_NK[:, column], 0.0)
            error_N = (wanted_N - values_N * scale_N) / factor_KK[column, column]
            weight_NK[:, column:stop] -= torch.outer(error_N, factor_KK[column, column:stop])
            values_NK[:, column], errors[:, column - first] = values_N, error_N
        weight_NK[:, stop:] -= errors @ factor_KK[first:stop, stop:]
    rounded_NK = torch.empty_like(values_NK)
    rounded_NK[:, order_K] = values_NK
    return rounded_NK
