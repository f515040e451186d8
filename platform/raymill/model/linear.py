"""Linear layers for training: torch's own module, with another way through the same three products on a CPU.

fp32 on x86 goes to oneDNN's kernels instead of MKL's: 109-113 against 95-103 GF/s on a Zen 4 core, for y = x W^T and
dx = dy W, whatever the order in memory. For dW = dy^T x oneDNN is only faster where its left operand lies row by row, so
the smaller of x and dy is laid out anew first. Small products, GPUs, other types, DTensors and compilers keep torch's.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raymill.model.kernels import is_plain, swiglu, swiglu_gradients

_LEAST_WORK = 1 << 22
"""Products of N, I and O below which oneDNN's call costs more than its kernels win."""


class Linear(nn.Linear):
    """nn.Linear whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def bare(self) -> bool:
        """Whether its weight is all that a call would use: no subclass, bias, hook, or layout over workers."""
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return type(self) is Linear and self.bias is None and not hooked and is_plain(self.weight)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b along the last dimension."""
    small = x.numel() * weight_OI.shape[0] < _LEAST_WORK
    if small or not _ONEDNN or not is_plain(x, weight_OI) or (bias_O is not None and not is_plain(bias_O)):
        return functional.linear(x, weight_OI, bias_O)
    y: Tensor = _Linear.apply(x, weight_OI, bias_O)
    return y


def swiglu_linear(gate: Tensor, up: Tensor, weight_OI: Tensor) -> Tensor:
    """(silu(gate) * up) W^T, whose middle is made again for the backward pass: a seventh of a block's memory."""
    small = gate.numel() * weight_OI.shape[0] < _LEAST_WORK
    if small or not _ONEDNN or not is_plain(gate, up, weight_OI):
        return linear(swiglu(gate, up), weight_OI)
    y: Tensor = _SwiGLULinear.apply(gate, up, weight_OI)
    return y


def multiply(a_NI: Tensor, b_IO: Tensor) -> Tensor:
    """a b, by whichever kernels are faster here."""
    if _ONEDNN and is_plain(a_NI, b_IO) and len(a_NI) * b_IO.numel() >= _LEAST_WORK:
        return product(a_NI.detach(), b_IO.detach().t())
    return a_NI @ b_IO


def product(a_NI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """a b^T + bias for fp32 matrices of any strides, by oneDNN."""
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(a_NI, b_OI, bias_O, "none", [], "")
    return y_NO


def weight_gradient(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dy^T x (O, I) by oneDNN, row by row in memory."""
    rows, outputs, inputs = len(x_NI), dy_NO.shape[1], x_NI.shape[1]
    if (rows + outputs) * inputs < rows * outputs:
        return product(x_NI.t().contiguous(), dy_NO.t()).t().contiguous()
    return product(dy_NO.t().contiguous(), x_NI.t())


def has_onednn() -> bool:
    """Whether this torch has oneDNN's kernels for this CPU."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


_ONEDNN = has_onednn()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight_OI)
        y_NO = product(x.view(-1, x.shape[-1]), weight_OI, bias_O)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx = product(dy_NO, weight_OI.t()).view_as(x) if x_needed else None
        dweight_OI = weight_gradient(dy_NO, x.view(-1, x.shape[-1])) if weight_needed else None
        return dx, dweight_OI, dy_NO.sum(0) if bias_needed else None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight_OI)
        x = swiglu(gate.detach(), up.detach())
        return product(x.view(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight_OI = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dweight_OI = None
        if ctx.needs_input_grad[2]:
            x = swiglu(gate.detach(), up.detach())
            dweight_OI = weight_gradient(dy_NO, x.view(-1, x.shape[-1]))
        dgate, dup = swiglu_gradients(product(dy_NO, weight_OI.t()).view_as(gate), gate, up)
        return dgate, dup, dweight_OI
