"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): a step of one size, signed by the momentum.

In: gradients in `.grad`. Out: changed parameters. One running mean is kept, half of AdamW's state. Every entry moves by
the whole learning rate, where AdamW's move by about a fifth of it: a tuned rate is three to ten times smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from raymill.training.untraced import Untraced


class Lion(Untraced):
    """Every group brings `lr` and `weight_decay` (decoupled)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                sign = state["exp_avg"].lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(sign, alpha=-group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)
