"""The chunked loss against whole logits: values, gradients, and what it leaves alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raymill.dataset.loader import IGNORE
from raymill.training import losses
from raymill.training.losses import next_token

VOCAB, DIM = 37, 24


def batch(ignored: float = 0.3) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_BTD = torch.randn(3, 50, DIM, generator=generator, requires_grad=True)
    head = nn.Linear(DIM, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    targets_BT = torch.randint(0, VOCAB, (3, 50), generator=generator)
    targets_BT[torch.rand(3, 50, generator=generator) < ignored] = IGNORE
    return x_BTD, head, targets_BT


def whole(x_BTD: Tensor, head: nn.Linear, targets_BT: Tensor) -> Tensor:
    logits_NV = functional.linear(x_BTD, head.weight).flatten(0, 1)
    return functional.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95])
def test_loss_and_gradients_are_those_of_whole_logits(
    chunk: int, ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    x_BTD, head, targets_BT = batch(ignored)
    loss, expected = next_token(targets_BT)(x_BTD, head), whole(x_BTD, head, targets_BT)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    leaves = (x_BTD, head.weight)
    for mine, reference in zip(
        torch.autograd.grad(loss / 7, leaves), torch.autograd.grad(expected / 7, leaves), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_the_chunk_changes_no_gradient_of_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BTD, head, targets_BT = batch()
    gradients = []
    for chunk in (64, 1000):
        monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
        gradients += torch.autograd.grad(next_token(targets_BT)(x_BTD, head), x_BTD)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_nothing_to_learn_is_a_loss_of_0_with_gradients_of_0() -> None:
    x_BTD, head, targets_BT = batch()
    loss = next_token(torch.full_like(targets_BT, IGNORE))(x_BTD, head)
    loss.backward()
    assert loss.item() == 0
    assert x_BTD.grad is not None
    assert not x_BTD.grad.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_without_gradients_the_loss_is_the_same() -> None:
    x_BTD, head, targets_BT = batch()
    learned = next_token(targets_BT)(x_BTD, head)
    with torch.no_grad():
        assert torch.equal(next_token(targets_BT)(x_BTD, head), learned.detach())


def test_a_frozen_head_gets_no_gradient_and_hidden_states_theirs() -> None:
    x_BTD, head, targets_BT = batch()
    head.weight.requires_grad_(False)
    next_token(targets_BT)(x_BTD, head).backward()
    assert head.weight.grad is None
    assert x_BTD.grad is not None


def test_a_head_that_is_more_than_a_matrix_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x_BTD, head, targets_BT = batch()
    doubled = Doubled(DIM, VOCAB, bias=False)
    doubled.weight = head.weight
    loss = next_token(targets_BT)(x_BTD, doubled)
    torch.testing.assert_close(loss, whole(2 * x_BTD, head, targets_BT), rtol=1e-6, atol=0)


def test_a_logit_that_is_not_a_number_is_seen_in_the_loss() -> None:
    x_BTD, head, targets_BT = batch(0.0)
    with torch.no_grad():
        x_BTD[1, 2, 3] = float("nan")
    assert next_token(targets_BT)(x_BTD, head).isnan()


def test_logits_of_any_size_lose_nothing() -> None:
    x_BTD, head, targets_BT = batch()
    large = (x_BTD * 300).detach()
    torch.testing.assert_close(next_token(targets_BT)(large, head), whole(large, head, targets_BT), rtol=1e-6, atol=0)


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    x_BTD, head, targets_BT = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token(targets_BT)(x_BTD, head)
    gradients = torch.autograd.grad(loss, (x_BTD, head.weight))
    expected = whole(x_BTD, head, targets_BT)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert loss.item() != expected.item()
    for mine, reference in zip(gradients, torch.autograd.grad(expected, (x_BTD, head.weight)), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - reference).norm() / reference.norm()) < 0.02
