"""An int8 KV cache, for measuring what it costs in quality: keys and values rounded as the engine will keep them.

Every head's key and every head's value at a position is a row of int8 with one scale, symmetric; keys are rounded after
they are turned. Attention computes with what is left of them. Nothing is saved here: the engine's cache is.

Shapes: B batch, T positions, H num_heads, K num_kv_heads, C head_width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor

from raymill.compression.int8 import quantize_rows
from raymill.model.transformer import Block, Transformer


def round_keys_and_values(model: Transformer) -> None:
    """Has every attention of `model` read int8 keys and values."""
    for block in cast("list[Block]", model.model.layers):
        block.self_attn.attend = partial(_attend, block.self_attn.attend)


def _attend(attend: Callable[..., Tensor], q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, **how: Any) -> Tensor:
    return attend(q_BTHC, _rounded(k_BTKC), _rounded(v_BTKC), **how)


def _rounded(x_BTKC: Tensor) -> Tensor:
    values, scale = quantize_rows(x_BTKC)
    return values * scale
