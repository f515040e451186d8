"""A head that int8 activations reach whole: the last norm's outputs are evened out, and the head makes up for it.

A row of activations has one scale, so a channel that is far larger than the others leaves those few steps. Dividing each
channel by a factor, in the gain of the norm that writes it, and multiplying the head's column by the same changes nothing
but how int8 falls on both (Xiao et al. 2023, "SmoothQuant", with its exponent of 1/2). The root mean squares of channel
and column are evened out, not their maxima: on our models the two were level, and a mean depends on no single token.

For a head of its own alone: a tied one is the embedding too, which has no norm before it. The factors are saved with the
head, for hidden states leave the engine as the norm gave them in full precision.

Shapes: V vocab_size, D model_dim, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymill.compression.calibrate import Walk
from raymill.compression.int8 import Int8Linear, quantize_rows
from raymill.model.transformer import LayerNorm, Transformer


@torch.no_grad()
def smooth_head(model: Transformer, head_VD: Tensor, walk: Walk) -> Int8Linear:
    """The head of `head_VD` in int8, and `model`'s last norm changed to fit it. `walk` has gone through every block."""
    norm = model.model.norm
    squares_D = torch.stack([norm(x_STD).square().flatten(0, -2).sum(0) for x_STD, _ in walk.states]).sum(0)
    factor_D = (squares_D / head_VD.square().sum(0)).pow(0.25)  # the roots of both means, and their ratio's root
    usable_D = torch.isfinite(factor_D) & (factor_D > 0)  # not of a channel or column of zeros
    factor_D[~usable_D] = 1.0
    factor_D[usable_D] /= factor_D[usable_D].log().mean().exp()
    norm.weight.div_(factor_D)
    if isinstance(norm, LayerNorm):
        norm.bias.div_(factor_D)
    head = Int8Linear(*quantize_rows(head_VD * factor_D))
    head.register_buffer("input_scale", factor_D)
    return head
