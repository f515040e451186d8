"""Rotary positions: how fast each pair of a head's numbers turns, and the cosines and sines of every position. No torch.

RoFormer (Su et al. 2021). Angles are computed in float64 and kept in float32.

Shapes: T max_seq_len, C head_width.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from raymill.model.config import ModelConfig, RopeScaling

Doubles = NDArray[np.float64]


def rotary_angles(config: ModelConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position times frequency, each (T, C/2); (T, 0) where there is no RoPE."""
    if not config.rotary:
        nothing = np.empty((config.max_seq_len, 0), np.float32)
        return nothing, nothing
    turns, gain = frequencies(config)
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float64), turns)
    return (gain * np.cos(angles)).astype(np.float32), (gain * np.sin(angles)).astype(np.float32)


def frequencies(config: ModelConfig) -> tuple[Doubles, float]:
    """Radians per position of each of the C/2 pairs, and what cosines and sines are multiplied by."""
    width = config.head_width
    turns = config.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    scaling = config.rope_scaling
    if scaling is None:
        return turns, 1.0
    if scaling.kind == "linear":
        return turns / scaling.factor, 1.0
    assert scaling.original_max_seq_len is not None
    in_original = turns * scaling.original_max_seq_len / (2 * math.pi)  # whole turns within the original length
    if scaling.kind == "llama3":
        kept = (in_original - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return _blend(turns, scaling.factor, np.clip(kept, 0, 1)), 1.0
    return _blend(turns, scaling.factor, _yarn_kept(config, scaling)), 0.1 * math.log(scaling.factor) + 1


def _blend(turns: Doubles, factor: float, kept: Doubles) -> Doubles:
    """Frequencies left alone where `kept` is 1, stretched by the factor where it is 0."""
    return turns * kept + turns / factor * (1 - kept)


def _yarn_kept(config: ModelConfig, scaling: RopeScaling) -> Doubles:
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
    return 1 - np.clip((np.arange(width // 2, dtype=np.float64) - low) / span, 0, 1)
