"""A running mean of the weights, which is validated and published in their place.

After n steps the mean is the sum of decay^(n - i) w_i over that of decay^(n - i), i = 1 to n: the weights after each
step, the newest counting most. The first draw never enters it, so a short run has a true mean too (Adam corrects its
moments in the same way). Costs one pass over the weights per step, and their size in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The mean, by parameter name; laid out as the parameters are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self._means = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after their update number `step` (from 1), once per update."""
        weight = (1 - self._decay) / (1 - self._decay**step)
        for name, mean in self._means.items():  # one by one: whole tensors may lie beside DTensors
            mean.lerp_(self._parameters[name], weight)

    def tensors(self) -> dict[str, Tensor]:
        """The mean itself, not a copy."""
        return dict(self._means)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved mean back, bit for bit."""
        for name, mean in self._means.items():
            mean.copy_(tensors[name])
