"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from raymill.training.config import ScheduleConfig


def learning_rate_at(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """The rate of step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * (config.final_fraction + (1 - config.final_fraction) * cosine)
