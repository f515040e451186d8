"""Which parameters an optimizer updates how, on a model with the names that matter and nothing else."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import nn

from raymill.training.config import OptimizerConfig
from raymill.training.optimizer import build_optimizer, set_learning_rate

Name = Literal["sgd", "adamw", "lion", "muon"]
NAMES: tuple[Name, ...] = ("sgd", "adamw", "lion", "muon")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    """A linear map through an embedding and two blocks, with a bias and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(8, 6)
        self.model.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 6)])
        self.model.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 8, bias=False)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def loss(self) -> torch.Tensor:
        ids = torch.arange(8)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.lm_head(self.model.norm(x)), (3 * ids + 1) % 8)


def one_step(model: Model, config: OptimizerConfig, *, still: bool = False) -> torch.optim.Optimizer:
    """A step; with `still`, one whose gradient is 0."""
    optimizer = build_optimizer(model, config)
    model.loss().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= not still
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_learns(name: Name) -> None:
    model = Model()
    before = model.loss().item()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=0.03))
    for _ in range(40):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    assert model.loss().item() < 0.65 * before


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_matrices_and_embeddings_by_rate_times_decay_and_leaves_vectors(name: Name) -> None:
    model = Model()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    one_step(model, OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5), still=True)
    for key, parameter in model.named_parameters():
        shrunk = before[key] * (0.95 if parameter.ndim == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), shrunk, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_tensors_of_the_parameters_shape_or_scalars(name: Name) -> None:
    model = Model()
    optimizer = one_step(model, OptimizerConfig(name=name))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state
        assert all(tensor.shape in (parameter.shape, torch.Size([])) for tensor in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_from_saved_state_equals_the_step_that_follows(name: Name) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.02)
    first, second = Model(), Model()
    one = one_step(first, config)
    second.load_state_dict(first.state_dict())
    two = build_optimizer(second, config)
    for here, there in zip(first.parameters(), second.parameters(), strict=True):
        two.state[there] = {field: tensor.clone() for field, tensor in one.state[here].items()}
    for model, optimizer in ((first, one), (second, two)):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    for here, there in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(here, there)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest_at_its_own_rate() -> None:
    model = Model()
    config = OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.003)
    optimizer = one_step(model, config)
    by_muon = {name for name, parameter in model.named_parameters() if "momentum" in optimizer.state[parameter]}
    assert by_muon == {"model.layers.0.weight", "model.layers.1.weight"}
    assert [group["peak"] for group in optimizer.param_groups] == [0.02, 0.003, 0.003]


def test_one_learning_rate_serves_both_parts_of_muon_unless_told() -> None:
    optimizer = build_optimizer(Model(), OptimizerConfig(name="muon", learning_rate=0.02))
    assert {group["peak"] for group in optimizer.param_groups} == {0.02}


def test_adamws_own_rate_is_muons_affair() -> None:
    optimizer = build_optimizer(Model(), OptimizerConfig(name="adamw", learning_rate=0.02, adamw_learning_rate=0.5))
    assert {group["peak"] for group in optimizer.param_groups} == {0.02}


def test_the_adamw_in_muon_is_torchs_to_the_bit() -> None:
    muon, adamw = Model(), Model()
    for name, model in (("muon", muon), ("adamw", adamw)):
        one_step(model, OptimizerConfig.model_validate({"name": name, "eps": 1e-6, "beta1": 0.8}))
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.bias"):
        assert torch.equal(muon.get_parameter(key), adamw.get_parameter(key)), key


def test_the_scale_moves_every_group_from_its_peak() -> None:
    config = OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.004)
    optimizer = build_optimizer(Model(), config)
    set_learning_rate(optimizer, 0.25)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002, 0.002]


def test_sgd_is_nesterovs() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    model = nn.Module()
    model.register_parameter("weight", parameter)
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.5))
    for gradient in (1.0, 3.0):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    # velocity 1, then 0.5 x 1 + 3 = 3.5; steps 1 + 0.5 x 1 = 1.5 and 3 + 0.5 x 3.5 = 4.75
    assert parameter.item() == pytest.approx(1 - 0.1 * (1.5 + 4.75))
