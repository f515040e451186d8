"""Rotary positions: how fast each pair of a head's numbers turns, and the tables of cosines and sines.

RoFormer (Su et al. 2021) in Llama's layout: number i is paired with number i + C/2. Angles are computed in float64 and
kept in float32, 8 bytes for each of max_seq_len x C.

Shapes: T max_seq_len, C head_width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raymill.model.config import ModelConfig, RopeScaling


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (T, C) with the halves repeated; (T, 0) where there is no RoPE."""
    if not config.rotary:
        return torch.empty(config.max_seq_len, 0), torch.empty(config.max_seq_len, 0)
    turns, gain = _frequencies(config)
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), turns)
    angles = torch.cat([angles, angles], dim=-1)
    return (gain * angles.cos()).float(), (gain * angles.sin()).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to the last dimension; cos and sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each of the C/2 pairs, and what cosines and sines are multiplied by."""
    width = config.head_width
    turns = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = config.rope_scaling
    if scaling is None:
        return turns, 1.0
    if scaling.kind == "linear":
        return turns / scaling.factor, 1.0
    assert scaling.original_max_seq_len is not None
    in_original = turns * scaling.original_max_seq_len / (2 * math.pi)  # whole turns within the original length
    if scaling.kind == "llama3":
        kept = (in_original - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return _blend(turns, scaling.factor, kept.clamp(0, 1)), 1.0
    return _blend(turns, scaling.factor, _yarn_kept(config, scaling)), 0.1 * math.log(scaling.factor) + 1


def _blend(turns: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Frequencies left alone where `kept` is 1, stretched by the factor where it is 0."""
    return turns * kept + turns / factor * (1 - kept)


def _yarn_kept(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """A ramp over the pairs between those that turn beta_fast and beta_slow times (YaRN, section 3.2)."""
    width = config.head_width

    def pair_of(turns: float) -> float:
        """The pair, as a fraction, that turns so often within the original length."""
        assert scaling.original_max_seq_len is not None
        return (
            width * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low, high = max(math.floor(pair_of(scaling.beta_fast)), 0), min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
    span = high - low if high != low else 0.001  # as the paper's code has it
    return 1 - ((torch.arange(width // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
