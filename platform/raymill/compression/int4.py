"""int4: weights in groups of input channels, one scale a group, and the layer that multiplies them with int8 activations.

The layer is what native code is tested against: right for every device, with exactly the integers of the format
(format.py), and quick enough to score a model: about 3 times the time of fp32 with groups of 32. It keeps the integers a
second time as fp32, in which a group's sum is exact: 128 x 8 x 127 is below 2^24.

A group's scale is searched: the power of the two signs and of a range of widths with the least squared error. Values are
-8..7, so a scale of the sign that lets the largest weight be -8 wastes nothing; a narrower range cuts few weights and
rounds the others finer.

Shapes: N output channels, K input channels, M rows (tokens), G group_size, J = K / G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raymill.compression.int8 import quantize_rows

LOWEST, HIGHEST = -8, 7
_LEAST_SCALE = 2.0**-24  # fp16's smallest number
_LARGEST_SCALE = 65504.0
_WIDTHS = 21
_NARROWEST = 0.7


class Int4Linear(nn.Module):
    """A linear layer: int4 weights in groups, activations int8 per row as they come; a bias is added in fp32."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale_NJ: Tensor, bias_N: Tensor | None = None) -> None:
        """weight uint8 (N, K/2), weight_scale fp16 (N, J)."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale_NJ)
        self.register_buffer("bias", bias_N)
        self._as_float: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) fp32 -> (..., N) fp32."""
        quantized, scale_M1 = quantize_rows(x.reshape(-1, x.shape[-1]))
        weight_JGN = self._grouped()
        x_JMG = quantized.float().unflatten(-1, (len(weight_JGN), -1)).transpose(0, 1)
        scale_JN = self.weight_scale.float().t()
        y_MN: Tensor = x_JMG[0] @ weight_JGN[0] * scale_JN[0]
        for group in range(1, len(weight_JGN)):
            y_MN += x_JMG[group] @ weight_JGN[group] * scale_JN[group]
        y_MN *= scale_M1
        if self.bias is not None:
            y_MN += self.bias
        y: Tensor = y_MN.view(*x.shape[:-1], -1)
        return y

    def _grouped(self) -> Tensor:
        if self._as_float is None or self._as_float.device != self.weight.device:
            values_NK = unpack(self.weight).float()
            self._as_float = values_NK.unflatten(-1, (self.weight_scale.shape[1], -1)).permute(1, 2, 0).contiguous()
        return self._as_float


def pack(values_NK: Tensor) -> Tensor:
    """Integers in -8..7 -> uint8 (N, K/2)."""
    stored = (values_NK + 8).to(torch.uint8)
    return stored[:, 0::2] | (stored[:, 1::2] << 4)


def unpack(weight: Tensor) -> Tensor:
    """The inverse: int8 (N, K)."""
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


def quantize_groups(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rounded to the nearest: packed values, and fp16 scales (N, J)."""
    scale_NJ = group_scales(weight_NK, group_size)
    scale_NK = scale_NJ.float().repeat_interleave(group_size, dim=1)
    return pack((weight_NK / scale_NK).round_().clamp_(LOWEST, HIGHEST)), scale_NJ


def group_scales(weight_NK: Tensor, group_size: int, importance_K: Tensor | None = None) -> Tensor:
    """fp16 scales (N, J) of least squared error, each input channel counted by its importance."""
    weight_NJG = weight_NK.unflatten(-1, (-1, group_size))
    importance_JG = None if importance_K is None else importance_K.to(weight_NK.dtype).view(-1, group_size)
    at_NJ1 = weight_NJG.abs().argmax(-1, keepdim=True)
    widest_NJ = weight_NJG.gather(-1, at_NJ1).squeeze(-1) / LOWEST  # of the largest weight's sign: it becomes -8
    best_NJ = torch.full_like(widest_NJ, torch.inf)
    scale_NJ = torch.full_like(widest_NJ, _LEAST_SCALE).half()
    for width in torch.linspace(_NARROWEST, 1.15, _WIDTHS).tolist():
        for sign in (1.0, -1.0):
            tried_NJ = _as_fp16(widest_NJ * (sign * width))
            step_NJ1 = tried_NJ.float()[..., None]
            error_NJG = (weight_NJG / step_NJ1).round_().clamp_(LOWEST, HIGHEST).mul_(step_NJ1).sub_(weight_NJG)
            error_NJG.square_()
            error_NJ = error_NJG.sum(-1) if importance_JG is None else (error_NJG * importance_JG).sum(-1)
            better_NJ = error_NJ < best_NJ
            best_NJ = torch.where(better_NJ, error_NJ, best_NJ)
            scale_NJ = torch.where(better_NJ, tried_NJ, scale_NJ)
    return scale_NJ


def _as_fp16(scale: Tensor) -> Tensor:
    """Rounded to fp16, away from zero and infinity."""
    size = scale.abs().clamp(_LEAST_SCALE, _LARGEST_SCALE)
    return torch.where(scale < 0, -size, size).half()
