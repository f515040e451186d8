"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from raymill.config import Config


class ScheduleConfig(Config):
    """Linear warmup, then decay to a fraction of the peak at the last step."""

    name: Literal["cosine"] = "cosine"
    """Half a cosine from the peak to the end (Loshchilov and Hutter 2017)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises linearly to its peak."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rate at the last step over the peak rate."""


def learning_rate_at(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """The rate of step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * (config.final_fraction + (1 - config.final_fraction) * cosine)
