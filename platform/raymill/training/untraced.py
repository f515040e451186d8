"""What torch's optimizers share, past the marks for torch's compiler.

torch's own class imports that compiler when it is made, 70 MB in every worker, to mark what it may not trace. Nothing traces
an optimizer here.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch


class Untraced(torch.optim.Optimizer):
    """torch's base of all optimizers, less the marks."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)
