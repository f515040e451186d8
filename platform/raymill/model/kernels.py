"""The small operations between a Transformer's matrices: norms, rotary positions, gated and plain activations.

Each is a function of tensors with its own gradient. Shapes: B batch, T sequence, D model_dim, F hidden_dim, H num_heads,
K num_kv_heads, C head_width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last dimension, times weight (Zhang and Sennrich 2019)."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its rms_norm: the residual and what the next branch reads, in one pass over memory."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x less its mean, over its standard deviation, times weight, plus bias (Ba et al. 2016)."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return functional.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2 has it (Hendrycks and Gimpel 2016)."""
    return functional.gelu(x, approximate="tanh")


def rotate(q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys; the tables have the halves of C repeated (RoFormer, Llama's layout)."""
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    return _rotate_one(q_BTHC, cos_T1C, sin_T1C), _rotate_one(k_BTKC, cos_T1C, sin_T1C)


def norm_rotate(
    q_BTHC: Tensor,
    k_BTKC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    eps: float,
    cos_TC: Tensor,
    sin_TC: Tensor,
) -> tuple[Tensor, Tensor]:
    """rms_norm of each head of queries and keys (Qwen 3), then rotate."""
    return rotate(rms_norm(q_BTHC, q_weight_C, eps), rms_norm(k_BTKC, k_weight_C, eps), cos_TC, sin_TC)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
