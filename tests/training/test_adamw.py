"""The lean AdamW against torch's own, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from raymill.training.adamw import AdamW


def test_it_takes_the_steps_of_torchs_own_to_the_bit() -> None:
    first = [torch.nn.Parameter(torch.randn(7, 33)), torch.nn.Parameter(torch.randn(33))]
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    ours = AdamW([{"params": first, "lr": 0.01, "weight_decay": 0.1}], betas=(0.9, 0.95), eps=1e-8)
    torchs = torch.optim.AdamW(second, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _ in range(3):
        for mine, other in zip(first, second, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        torchs.step()
        ours.zero_grad()
        assert all(parameter.grad is None for parameter in first)
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)
        assert ours.state[mine].keys() == torchs.state[other].keys()
        assert all(torch.equal(ours.state[mine][key], value) for key, value in torchs.state[other].items())


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_a_step_leaves_torchs_compiler_unloaded(name: str) -> None:
    program = """
import sys
import torch
from raymill.training.config import OptimizerConfig
from raymill.training.optimizer import build_optimizer
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
optimizer = build_optimizer(model, OptimizerConfig(name=sys.argv[1]))
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
before = model[0].weight.detach().clone()
optimizer.step()
optimizer.zero_grad()
assert not torch.equal(model[0].weight, before) and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, name], check=True)
