"""Causal attention for training and evaluation.

Shapes: B batch, T sequence, H num_heads, K num_kv_heads (divides H), C head_width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def attend(
    q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, *, documents_BT: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Scaled dot-product attention (B, T, H, C), scale 1 / sqrt(C).

    A position sees those before it and itself: with documents_BT (int64, never falling along T) only those of its own
    document number, with `window` only the last `window` of them, itself included.
    """
    seen_B1TT = None
    if documents_BT is not None:
        seen_B1TT = (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()[:, None]
    assert window is None
    y_BHTC = functional.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BTKC.transpose(1, 2),
        v_BTKC.transpose(1, 2),
        attn_mask=seen_B1TT,
        is_causal=seen_B1TT is None,
        enable_gqa=True,
    )
    return y_BHTC.transpose(1, 2)
