"""Linear layers that multiply in fp8, for training on GPUs that can (Hopper and Ada on): twice the rate of bf16.

Inputs and weights are rounded to e4m3, gradients to e5m2 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"),
each tensor by one scale taken from its own largest value at every step; products are summed in fp32. Weights stay what
they are, and what is kept for the backward pass is fp8. Only the layers inside blocks: the head's loss wants bf16.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MULTIPLE = 16
"""Rows, inputs and outputs of an fp8 product are multiples of this."""

CAPABILITY = (8, 9)
"""The least CUDA compute capability with fp8."""


class Fp8Linear(nn.Linear):
    """nn.Linear whose three products are fp8; the output has the input's type, under autocast bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over a layer's parameters."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def use_fp8(block: nn.Module) -> None:
    """Gives a block's linear layers fp8 products, in place; names and parameters stay."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Fp8Linear(child))


def to_fp8(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor over its scale in fp8, and that scale: its largest value becomes the type's largest."""
    largest = torch.finfo(dtype).max
    scale = tensor.abs().amax().float().clamp(min=1e-12) / largest
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply(a_NI: Tensor, b_OI: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T times both scales; both row by row in memory. `fast` sums with fewer bits."""
    y_NO: Tensor = torch._scaled_mm(a_NI, b_OI.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return y_NO


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_NI, x_scale = to_fp8(x.reshape(-1, x.shape[-1]), torch.float8_e4m3fn)
        w_OI, w_scale = to_fp8(weight_OI, torch.float8_e4m3fn)
        ctx.save_for_backward(x_NI, x_scale, w_OI, w_scale)
        ctx.types = x.dtype, weight_OI.dtype
        output_type = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        return multiply(x_NI, w_OI, x_scale, w_scale, output_type, fast=True).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x_NI, x_scale, w_OI, w_scale = ctx.saved_tensors
        x_type, weight_type = ctx.types
        dy_NO, dy_scale = to_fp8(dy.reshape(-1, dy.shape[-1]), torch.float8_e5m2)
        dx_NI = multiply(dy_NO, w_OI.t().contiguous(), dy_scale, w_scale, x_type, fast=False)
        dw_OI = multiply(dy_NO.t().contiguous(), x_NI.t().contiguous(), dy_scale, x_scale, weight_type, fast=False)
        return dx_NI.view(*dy.shape[:-1], -1), dw_OI
