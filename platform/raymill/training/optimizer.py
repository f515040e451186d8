"""The optimizer by name: which parameters it updates how, and what it decays.

Every parameter group carries `peak`, its learning rate where the schedule stands at 1; `set_learning_rate` moves all of
them together. Matrices are decayed, decoupled from the gradient (Loshchilov and Hutter 2019), embeddings among them;
vectors (norms, biases) never are. What an optimizer keeps stands in `state[parameter]`: tensors by field.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raymill.training.adamw import AdamW
from raymill.training.config import OptimizerConfig
from raymill.training.lion import Lion
from raymill.training.sgd import SGD


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """One optimizer for all of the model's parameters, whole tensors or DTensors.

    `group`: workers that hold the same matrices and share muon's work on them; every one of them calls step().
    """
    named = list(model.named_parameters())
    blocks = [parameter for name, parameter in named if config.name == "muon" and _is_block_matrix(name, parameter)]
    chosen = {id(parameter) for parameter in blocks}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    matrices = [parameter for parameter in rest if parameter.ndim >= 2]
    vectors = [parameter for parameter in rest if parameter.ndim < 2]
    rate = config.learning_rate
    if config.name == "muon" and config.adamw_learning_rate is not None:
        rate = config.adamw_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": blocks, "method": "muon", "peak": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": matrices, "method": "adamw", "peak": rate, "weight_decay": config.weight_decay},
        {"params": vectors, "method": "adamw", "peak": rate, "weight_decay": 0.0},
    ]
    groups = [
        {**group, "params": alike, "lr": group["peak"]} for group in groups for alike in _by_mesh(group["params"])
    ]
    betas = (config.beta1, config.beta2)
    if config.name == "muon":
        from raymill.training.muon import Muon  # brings DTensor and sympy, 34 MB

        return Muon(groups, momentum=config.momentum, betas=betas, eps=config.eps, group=group)
    if config.name == "lion":
        return Lion(groups, betas=betas)
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum)
    return AdamW(groups, betas=betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Gives every group this fraction of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters by the workers they are split over: fused steps take plain tensors or DTensors of one mesh, no mixture."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(kinds.values())


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".layers." in f".{name}"
