"""fp8 products are near the exact ones, forward and backward, and change no name."""

import pytest
import torch
from torch import Tensor, nn

from raymill.model.config import ModelConfig
from raymill.model.fp8 import Fp8Linear, to_fp8, use_fp8
from raymill.model.transformer import Transformer


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_products_are_within_the_rounding_of_fp8(size: float) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 48)
    x, dy = (size * torch.randn(2, 16, 64)).requires_grad_(), torch.randn(2, 16, 48) / size
    found, expected = Fp8Linear(exact)(x), exact(x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert distance(found, expected) < 0.05
    gradients = torch.autograd.grad(found, [x, exact.weight, exact.bias], dy)
    for one, other in zip(gradients, torch.autograd.grad(expected, [x, exact.weight, exact.bias], dy), strict=True):
        assert one.dtype == other.dtype and distance(one, other) < 0.08


def test_under_autocast_the_output_is_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Fp8Linear(nn.Linear(64, 48))(torch.randn(16, 64)).dtype == torch.bfloat16


def test_zeros_stay_zeros() -> None:
    numbers, scale = to_fp8(torch.zeros(16, 16), torch.float8_e4m3fn)
    assert not numbers.float().any() and scale.isfinite()


def test_a_model_in_fp8_has_the_same_parameters_and_nearly_the_same_logits() -> None:
    config = ModelConfig(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, hidden_dim=48, max_seq_len=16)
    model = Transformer(config, 64)
    model.initialize(0)
    ids_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    expected, names = model(ids_BT), [name for name, _ in model.named_parameters()]
    for block in model.model.layers:
        use_fp8(block)
    assert [name for name, _ in model.named_parameters()] == names
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 14
    assert 0 < distance(model(ids_BT), expected) < 0.05
