"""Rotary positions in torch: the tables of a model (angles.py computes them), and turning by them.

Llama's layout: number i of a head is paired with number i + C/2. The tables take 8 bytes for each of max_seq_len x C.

Shapes: T max_seq_len, C head_width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymill.model import angles
from raymill.model.config import ModelConfig


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (T, C) with the halves repeated; (T, 0) where there is no RoPE."""
    cos, sin = map(torch.from_numpy, angles.rotary_angles(config))
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each of the C/2 pairs, and what cosines and sines are multiplied by."""
    turns, gain = angles.frequencies(config)
    return torch.from_numpy(turns), gain


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to the last dimension; cos and sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
