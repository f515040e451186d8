"""Muon (Jordan 2024): the momentum of a matrix, made orthogonal, is its update; AdamW for whatever is no matrix of a block.

In: gradients in `.grad`. Out: changed parameters. The update of a matrix is its Nesterov momentum with every singular
value moved near 1 by a few products (Newton-Schulz), in fp32: bf16 is 15 times slower on CPUs without AMX. An update is
scaled by 0.2 sqrt(long side), which gives it the root mean square that AdamW's has (Moonshot 2025, "Muon is Scalable for
LLM Training"), so one learning rate and one weight decay serve both.

Shapes: S short side, L long side of a matrix (taller ones are worked on transposed), N matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
"""a, b, c of each step x -> a x + b x^3 + c x^5 on the singular values (Jordan 2024)."""


class Muon(torch.optim.Optimizer):
    """Groups with `method` muon hold matrices; those with adamw anything. Weight decay is decoupled in both."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["method"] == "muon":
                self._orthogonal_step(parameters, group)
            else:
                self._adamw_step(parameters, group)

    def _orthogonal_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = orthogonalize(parameter.grad.lerp(state["momentum"], group["momentum"]))
            scale = 0.2 * max(parameter.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _adamw_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [*parameters],
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values between about 0.7 and 1.2, those that are 0 but for rounding excepted."""
    tall = matrix.shape[0] > matrix.shape[1]
    x_SL = matrix.mT.contiguous() if tall else matrix
    x_SL = x_SL / (x_SL.norm() + 1e-30)
    for a, b, c in COEFFICIENTS:
        gram_SS = x_SL @ x_SL.mT
        x_SL = torch.addmm(x_SL, torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c), x_SL, beta=a)
    return x_SL.mT if tall else x_SL
