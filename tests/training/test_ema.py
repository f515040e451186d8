import torch
from torch import nn

from raymill.training.ema import Ema


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def move(linear: nn.Linear, step: int) -> None:
    """The weights after a step, whatever they were before."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_it_is_the_weighted_mean_of_the_weights_after_each_step() -> None:
    linear = model()
    ema = Ema(linear, 0.8)
    seen = []
    for step in range(1, 8):
        move(linear, step)
        ema.update(step)
        seen.append(linear.weight.detach().double())
    weights = [0.8 ** (7 - step) for step in range(1, 8)]
    mean = sum(weight * each for weight, each in zip(weights, seen, strict=True)) / sum(weights)
    torch.testing.assert_close(ema.tensors()["weight"].double(), mean, rtol=1e-5, atol=1e-6)


def test_after_one_step_it_is_the_weights_and_not_the_first_draw() -> None:
    linear = model()
    ema = Ema(linear, 0.999)
    move(linear, 1)
    ema.update(1)
    assert torch.equal(ema.tensors()["weight"], linear.weight)


def test_it_leaves_the_model_alone() -> None:
    linear = model()
    before = linear.weight.detach().clone()
    ema = Ema(linear, 0.5)
    ema.update(3)
    ema.tensors()["weight"].zero_()
    assert torch.equal(linear.weight, before)


def test_a_resumed_mean_goes_on_to_the_bit() -> None:
    whole = model()
    undisturbed = Ema(whole, 0.9)
    for step in range(1, 11):
        move(whole, step)
        undisturbed.update(step)
        if step == 4:
            saved = {name: tensor.clone() for name, tensor in undisturbed.tensors().items()}
    again = model()
    resumed = Ema(again, 0.9)
    resumed.load(saved)
    for step in range(5, 11):
        move(again, step)
        resumed.update(step)
    for name, tensor in undisturbed.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_its_names_are_the_parameters() -> None:
    assert set(Ema(model(), 0.9).tensors()) == {"weight", "bias"}
