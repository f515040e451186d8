"""AdamW (Loshchilov and Hutter 2019) by torch's fused kernel, the same bits as torch.optim.AdamW(fused=True).

Keeps two numbers per parameter. Unlike torch's class it loads no compiler (training/untraced.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from raymill.training.untraced import Untraced


class AdamW(Untraced):
    """Every group brings `lr` and `weight_decay`, decoupled."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            step_group(group, self.state)


def step_group(group: dict[str, Any], state: dict[Any, Any]) -> None:
    """AdamW for the parameters of a group that have gradients; the group brings `lr`, `weight_decay`, `betas`, `eps`."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not parameters:
        return
    for parameter in parameters:
        if not state[parameter]:
            state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    states = [state[parameter] for parameter in parameters]
    adamw(
        parameters,
        [parameter.grad for parameter in parameters],
        [each["exp_avg"] for each in states],
        [each["exp_avg_sq"] for each in states],
        [],
        [each["step"] for each in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
