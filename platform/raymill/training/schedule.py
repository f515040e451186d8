"""The learning rate as a function of the step: a linear rise to the peak, then down as train.schedule.name says.

    cosine  half a cosine from the end of the warmup to the end of the run (Loshchilov and Hutter 2017, without restarts)
    linear  a straight line between the same points
    step    the peak, times `factor` from each milestone on
    wsd     the peak, then a straight line over the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM)

cosine, linear and wsd would give `final_fraction` of the peak to the step after the last one: at a fraction of 0 the last
step still has a rate, and learns. A run that ends before its warmup rises only.
"""

from __future__ import annotations

import math

from raymill.training.config import ScheduleConfig


def learning_rate_scale(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The fraction of the peak, 0 to 1, that step `step` (from 0) of `total_steps` is taken with."""
    rise = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    return min(1.0, rise, _fall(step, total_steps, config))


def _fall(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """What the schedule would give if there were no warmup."""
    if config.name == "step":
        return config.factor ** sum(step >= milestone * total_steps for milestone in config.milestones)
    if config.name == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        left = min(1.0, (total_steps - step) / decay_steps)
    else:
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        left = 1 - min(1.0, max(0.0, done))
        if config.name == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
    return config.final_fraction + (1 - config.final_fraction) * left
