"""Linear layers for training: torch's own module, with another way through the same three products on a CPU.

fp32 on x86 goes to oneDNN's kernels instead of MKL's: 109-113 against 95-103 GF/s on a Zen 4 core, for y = x W^T and
dx = dy W, whatever the order in memory. For dW = dy^T x oneDNN is only faster where its left operand lies row by row, so
the smaller of x and dy is laid out anew first. Layers that read one norm are one function: it keeps the norm's input only.
Small products, GPUs, other types, DTensors and compilers keep torch's.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raymill.model.kernels import (
    is_plain,
    normed_again,
    rms_norm_gradients,
    sum_and_norm,
    swiglu,
    swiglu_gradients,
)

_LEAST_WORK = 1 << 22
"""Products of N, I and O below which oneDNN's call costs more than its kernels win."""


class Linear(nn.Linear):
    """nn.Linear whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def alone(self) -> bool:
        """Whether its weight and bias are all that a call would use: no subclass, hook, or layout over workers."""
        return type(self) is Linear and not is_hooked(self) and is_plain(*self.parameters())

    @property
    def bare(self) -> bool:
        """Whether its weight is all that a call would use."""
        return self.bias is None and self.alone


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b along the last dimension."""
    small = x.numel() * weight_OI.shape[0] < _LEAST_WORK
    if small or not _ONEDNN or not is_plain(x, weight_OI) or (bias_O is not None and not is_plain(bias_O)):
        return functional.linear(x, weight_OI, bias_O)
    y: Tensor = _Linear.apply(x, weight_OI, bias_O)
    return y


def is_hooked(module: nn.Module) -> bool:
    """Whether something else wants to know of the module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def norm_linears(
    x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, layers: Sequence[Linear]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x + y, and what all layers make of its rms_norm. All are `alone`.

    The norm is made again for the backward pass instead of kept, and laid out once for the gradients of all weights.
    """
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    summed, *outputs = _NormLinears.apply(x, y, weight_D, eps, *weights, *biases)
    return x if y is None else summed, tuple(outputs)


def joins_norm(x: Tensor, weight_D: Tensor, layers: Sequence[Linear]) -> bool:
    """Whether norm_linears is the way through these layers."""
    if not _ONEDNN or not is_plain(x, weight_D) or not all(getattr(layer, "alone", False) for layer in layers):
        return False
    return min(x.numel() * len(layer.weight) for layer in layers) >= _LEAST_WORK


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


def add_product(sum_NO: Tensor | None, a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """sum + a b^T, the sum made as the product is written."""
    if sum_NO is None:
        return product(a_NI, b_OI)
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a_NI, sum_NO, b_OI, None, "add")
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
            del x
        dgate, dup = swiglu_gradients(product(dy_NO, weight_OI.t()).view_as(gate), gate, up)
        return dgate, dup, dweight_OI


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, *matrices: Tensor | None) -> Any:
        weights, biases = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
        summed, roots_N, normed = sum_and_norm(x, y, weight_D, eps)
        ctx.save_for_backward(x.contiguous() if summed is None else summed, weight_D, roots_N, *weights)
        ctx.set_materialize_grads(False)
        normed_ND = normed.view(-1, normed.shape[-1])
        outputs = [
            product(normed_ND, weight_OI, bias_O).view(*x.shape[:-1], -1)
            for weight_OI, bias_O in zip(weights, biases, strict=True)
            if weight_OI is not None
        ]
        return summed, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_D, roots_N, *weights = ctx.saved_tensors
        normed_DN = normed_again(x, weight_D, roots_N).view(-1, x.shape[-1]).t().contiguous()
        dnormed_ND: Tensor | None = None
        dweights: list[Tensor | None] = []
        dbiases: list[Tensor | None] = []
        for number, (dy, weight_OI) in enumerate(zip(dys, weights, strict=True)):
            if dy is None:
                dweights.append(None)
                dbiases.append(None)
                continue
            dy_NO = dy.reshape(-1, dy.shape[-1])
            dnormed_ND = add_product(dnormed_ND, dy_NO, weight_OI.t())
            dweights.append(product(normed_DN, dy_NO.t()).t().contiguous())
            dbiases.append(dy_NO.sum(0) if ctx.needs_input_grad[4 + len(weights) + number] else None)
        if dnormed_ND is None:
            return dsum, dsum if ctx.needs_input_grad[1] else None, None, None, *dweights, *dbiases
        del normed_DN
        dx, dweight_D = rms_norm_gradients(x, weight_D, roots_N, dnormed_ND.view_as(x), dsum)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight_D, None, *dweights, *dbiases
