"""Attention over blocks against torch's with an explicit mask, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raymill.model.attention import attend

# T, H, K, C, window; lengths around a block of 64 queries and around a kept and a recomputed softmax.
SHAPES = [
    (1, 2, 2, 8, None),
    (63, 4, 2, 6, None),
    (64, 3, 1, 10, None),
    (65, 4, 4, 8, 1),
    (130, 6, 2, 16, 33),
    (200, 2, 2, 2, 200),
    (450, 2, 1, 12, None),
    (450, 2, 2, 12, 100),
]


def draw(length: int, heads: int, kv_heads: int, width: int, batch: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads)]
    return tuple((2 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes)


def numbers(length: int, batch: int = 3) -> Tensor:
    """Documents that begin anywhere: many in the first sequence, one in the last."""
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(9)) < torch.tensor(
        [[0.2], [0.02], [0.0]]
    )
    return begins.long().cumsum(1)


def masked(q: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor | None, window: int | None) -> Tensor:
    at = torch.arange(q.shape[1])
    seen = (at[:, None] >= at)[None].expand(len(q), -1, -1)
    if documents_BT is not None:
        seen = seen & (documents_BT[:, :, None] == documents_BT[:, None, :])
    if window is not None:
        seen = seen & (at[:, None] - at < window)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("in_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_an_explicit_mask(
    shape: tuple[int, int, int, int, int | None], in_documents: bool
) -> None:
    *sizes, window = shape
    q, k, v = draw(*sizes)
    documents_BT = numbers(sizes[0]) if in_documents else None
    y, expected = attend(q, k, v, documents_BT=documents_BT, window=window), masked(q, k, v, documents_BT, window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for mine, reference in zip(
        torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("in_documents", [False, True])
def test_other_types_see_the_same(window: int | None, in_documents: bool) -> None:
    q, k, v = (each.double() for each in draw(100, 4, 2, 8))
    documents_BT = numbers(100) if in_documents else None
    y = attend(q, k, v, documents_BT=documents_BT, window=window)
    torch.testing.assert_close(y, masked(q, k, v, documents_BT, window))


def test_the_same_bits_every_time_and_for_any_number_of_threads() -> None:
    before, runs = torch.get_num_threads(), []
    q, k, v = draw(450, 4, 2, 16)
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            y = attend(q, k, v, documents_BT=numbers(450))
            runs.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, first) for mine, first in zip(runs[1], runs[0], strict=True))
    for mine, first in zip(runs[2], runs[0], strict=True):
        torch.testing.assert_close(mine, first, rtol=1e-5, atol=1e-5)


def test_a_document_does_not_know_what_stands_before_it() -> None:
    q, k, v = draw(150, 2, 2, 8, batch=1)
    documents_BT = (torch.arange(150) >= 70).long()[None]
    with torch.no_grad():
        y = attend(q, k, v, documents_BT=documents_BT)
        k[:, :70], v[:, :70] = 1e3, 1e4
        torch.testing.assert_close(attend(q, k, v, documents_BT=documents_BT)[:, 70:], y[:, 70:], rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_changes() -> None:
    q, k, v = draw(130, 4, 2, 8)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), attend(q, k, v))
    torch.testing.assert_close(attend(q, k, v).detach(), masked(q, k, v, None, None).detach(), rtol=1e-5, atol=1e-5)
