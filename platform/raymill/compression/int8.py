"""int8: rows of integers with one scale each, and the layers that multiply and look them up.

Activations are quantized per token as they come (LLM.int8, SmoothQuant's baseline), so a product is int8 x int8 summed
exactly in int32: the result for one token does not depend on its neighbours in a batch.

On a CPU with VNNI `torch._int_mm` runs a 256 x 1024 product of one row in 6 us where fp32 needs 26. Elsewhere the same
integers are multiplied as fp32: right, without the speed. Weight-only int8 is never used: on CPUs it is slower than fp32.

Shapes: N output channels, K input channels, M rows (tokens), V vocab_size, D model_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SMALLEST = 1e-12
"""Scale of a row of zeros; any positive number does."""
_EXACT = 2**24 // (128 * 127)
"""Input channels whose products of int8 fp32 sums without rounding, in whatever order."""


class Int8Linear(nn.Module):
    """A linear layer: int8 weights, activations quantized per row as they come; a bias is added in fp32."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_NK: Tensor, weight_scale_N1: Tensor, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_NK)
        self.register_buffer("weight_scale", weight_scale_N1)
        self.register_buffer("bias", bias_N)
        self._as_float: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) fp32 -> (..., N) fp32."""
        quantized, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y_MN: Tensor = self._product(quantized).float().mul_(self.weight_scale.view(1, -1))
        y_MN.mul_(scale)
        if self.bias is not None:
            y_MN.add_(self.bias)
        y: Tensor = y_MN.view(*x.shape[:-1], -1)
        return y

    def _product(self, x_MK: Tensor) -> Tensor:
        if has_int8_products(x_MK.device):
            return torch._int_mm(x_MK, self.weight.t())
        if self._as_float is None or self._as_float.device != x_MK.device:
            self._as_float = self.weight.float()
        x_MK = x_MK.float()
        if x_MK.shape[1] <= _EXACT:
            return x_MK @ self._as_float.t()
        parts = zip(x_MK.split(_EXACT, dim=1), self._as_float.split(_EXACT, dim=1), strict=True)
        return torch.stack([(x @ weight.t()).to(torch.int32) for x, weight in parts]).sum(0, dtype=torch.int32)


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix, dequantized as they are looked up."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight_VD: Tensor, weight_scale_V1: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VD)
        self.register_buffer("weight_scale", weight_scale_V1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.weight_scale[ids]


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and the fp32 scale (M, 1) of each row: x is about values * scale, symmetric around zero."""
    scale_M1 = row_scales(x_MK)
    return (x_MK / scale_M1).round_().to(torch.int8), scale_M1


def row_scales(x_MK: Tensor) -> Tensor:
    """The scale (..., 1) with which the largest of each row is 127."""
    largest: Tensor = torch.linalg.vector_norm(x_MK, torch.inf, dim=-1, keepdim=True)
    return largest.div_(127.0).clamp_min_(_SMALLEST)


def has_int8_products(device: torch.device) -> bool:
    """Whether `torch._int_mm` is fast here."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())
