"""SGD with Nesterov's momentum (Sutskever et al. 2013): a step along the gradient and the gradients before it.

In: gradients in `.grad`. Out: changed parameters. One sum is kept per parameter, none at momentum 0. Weight decay is taken
off the weights, where torch's own class adds it to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from raymill.training.untraced import Untraced


class SGD(Untraced):
    """Every group brings `lr` and `weight_decay` (decoupled)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            momentum = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad, alpha=-group["lr"])
                if momentum:
                    state = self.state[parameter]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
                    parameter.add_(state["momentum_buffer"], alpha=-group["lr"] * momentum)
