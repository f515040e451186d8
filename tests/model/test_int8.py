"""int8 products against fp32 ones, and which layers get them."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raymill.model.config import ModelConfig
from raymill.model.int8 import RoundedLinear, supports_int8, use_int8
from raymill.model.linear import Linear
from raymill.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not supports_int8(), reason="a CPU without VNNI")


def layer(inputs: int = 96, outputs: int = 80) -> tuple[RoundedLinear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    linear = Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        linear.bias.normal_(generator=generator)
    x = torch.randn(3, 50, inputs, generator=generator) * torch.logspace(-2, 2, 50)[:, None]
    return RoundedLinear(linear), x.requires_grad_(), torch.randn(3, 50, outputs, generator=generator)


def results(int8: RoundedLinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = int8(x)
    return [y.detach(), *torch.autograd.grad(y, (x, int8.weight, int8.bias), dy)]


def test_outputs_and_gradients_are_within_a_hundredth_of_fp32() -> None:
    int8, x, dy = layer()
    expected = functional.linear(x, int8.weight, int8.bias)
    gradients = torch.autograd.grad(expected, (x, int8.weight, int8.bias), dy)
    for mine, reference in zip(results(int8, x, dy), (expected.detach(), *gradients), strict=True):
        assert 0 <= float((mine - reference).norm() / reference.norm()) < 0.015


def test_a_row_is_rounded_by_its_own_scale() -> None:
    int8, x, _ = layer()
    with torch.no_grad():
        y = int8(x) - int8.bias
        exact = functional.linear(x, int8.weight)
    assert float(((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) < 0.02


def test_whole_numbers_up_to_127_are_exact() -> None:
    int8, _, _ = layer(8, 4)
    with torch.no_grad():
        int8.weight.copy_(torch.randint(-126, 127, (4, 8)))
        int8.weight[:, 0] = 127
        x = torch.randint(-126, 127, (5, 8)).float()
        x[:, 1] = -127
        torch.testing.assert_close(int8(x), functional.linear(x, int8.weight, int8.bias), rtol=1e-5, atol=1e-2)


def test_the_same_bits_for_any_number_of_threads() -> None:
    before, runs = torch.get_num_threads(), []
    int8, x, dy = layer(768, 512)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(int8, x, dy))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run[:3], runs[0][:3], strict=True))


def test_zeros_stay_zero_and_nan_is_seen() -> None:
    int8, x, _ = layer()
    with torch.no_grad():
        x[0] = 0
        x[1, 2, 3] = float("nan")
        y = int8(x)
    assert torch.equal(y[0], int8.bias.expand(50, -1))
    assert y[1, 2].isnan().all()
    assert y[2].isfinite().all()


def test_the_matrices_of_blocks_are_rounded_and_share_their_parameters() -> None:
    model = Transformer(ModelConfig(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, hidden_dim=64), 50)
    before = dict(model.named_parameters())
    for block in model.model.layers:
        use_int8(block)
    rounded = [name for name, each in model.named_modules() if type(each) is RoundedLinear]
    assert len(rounded) == 14
    assert not any("lm_head" in name for name in rounded)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_small_model_learns_as_in_fp32() -> None:
    losses = []
    for in_int8 in (False, True):
        model = Transformer(ModelConfig(num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, hidden_dim=128), 32)
        model.initialize(0)
        if in_int8:
            for block in model.model.layers:
                use_int8(block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids_BT = (torch.arange(64) * torch.tensor([[1], [3], [5], [7]])) % 32
        for _ in range(30):
            loss = functional.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 1.5
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
