"""The compiled paths against torch's own operations, forward and backward; any number of threads gives the same bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raymill.model import kernels
from raymill.model.linear import Linear, linear, swiglu_linear

EPS = 1e-5


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def turn(x: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_TC[:, None] + torch.cat([-second, first], dim=-1) * sin_TC[:, None]


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles_TC = torch.outer(torch.arange(length), torch.rand(width // 2)).repeat(1, 2)
    return angles_TC.cos(), angles_TC.sin()


COS, SIN = tables(5, 6)
CASES = {
    "rms_norm": (
        lambda x, w: kernels.rms_norm(x, w, EPS),
        lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        (draw(2, 300, 40), draw(40)),
    ),
    "add_rms_norm": (
        lambda x, y, w: kernels.add_rms_norm(x, y, w, EPS),
        lambda x, y, w: (x + y, functional.rms_norm(x + y, w.shape, w, EPS)),
        (draw(3, 7, 40), draw(3, 7, 40) * 2, draw(40)),
    ),
    "swiglu": (kernels.swiglu, lambda g, u: functional.silu(g) * u, (4 * draw(3, 70), draw(3, 70))),
    "gelu": (kernels.gelu, lambda x: functional.gelu(x, approximate="tanh"), (4 * draw(3, 71),)),
    "rotate": (
        lambda q, k: kernels.rotate(q, k, COS, SIN),
        lambda q, k: (turn(q, COS, SIN), turn(k, COS, SIN)),
        (draw(2, 5, 4, 6), draw(2, 5, 2, 6)),
    ),
    "norm_rotate": (
        lambda q, k, a, b: kernels.norm_rotate(q, k, a, b, EPS, COS, SIN),
        lambda q, k, a, b: (
            turn(functional.rms_norm(q, a.shape, a, EPS), COS, SIN),
            turn(functional.rms_norm(k, b.shape, b, EPS), COS, SIN),
        ),
        (draw(2, 5, 4, 6), draw(2, 5, 2, 6), draw(6), draw(6) + 1),
    ),
    "linear": (linear, functional.linear, (draw(2, 130, 128), draw(160, 128), draw(160))),
    "swiglu_linear": (
        swiglu_linear,
        lambda g, u, w: functional.linear(functional.silu(g) * u, w),
        (draw(2, 130, 160), draw(2, 130, 160) * 2, draw(128, 160)),
    ),
    "linear, narrow": (linear, functional.linear, (draw(2, 130, 256), draw(96, 256))),
}


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    results = function(*leaves)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    loss = sum((draw(*each.shape) * each).sum() for each in outputs)
    assert isinstance(loss, Tensor)
    return [each.detach() for each in outputs] + list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", CASES)
def test_compiled_path_gives_what_torch_gives(name: str) -> None:
    ours, theirs, inputs = CASES[name]
    for mine, reference in zip(outputs_and_gradients(ours, inputs), outputs_and_gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-5, atol=2e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_other_types_take_the_plain_path(name: str) -> None:
    ours, theirs, inputs = CASES[name]
    if "rotate" in name:
        pytest.skip("the tables are float32")
    double = tuple(each.double() for each in inputs)
    for mine, reference in zip(outputs_and_gradients(ours, double), outputs_and_gradients(theirs, double), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    cos, sin = (each.repeat(13, 11)[:64, :64].contiguous() for each in (COS, SIN))
    cases = (
        (lambda x, y, w: kernels.add_rms_norm(x, y, w, EPS), (draw(4, 300, 96), draw(4, 300, 96), draw(96))),
        (
            lambda q, k, a, b: kernels.norm_rotate(q, k, a, b, EPS, cos, sin),
            (draw(3, 64, 8, 64), draw(3, 64, 4, 64), draw(64), draw(64)),
        ),
        (kernels.swiglu, (draw(700, 150), draw(150, 700).t())),
    )
    runs = []
    for count in (1, 2, 3, 2):
        threads(count)
        runs.append([tensor for function, inputs in cases for tensor in outputs_and_gradients(function, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


def test_a_gradient_that_nobody_asked_for_is_left_out() -> None:
    x, y, w = draw(3, 4).requires_grad_(), draw(3, 4), torch.ones(4)
    total, _ = kernels.add_rms_norm(x, y, w, EPS)
    total.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 4))


def test_nan_and_infinity_are_not_hidden() -> None:
    for bad in (float("nan"), float("inf")):
        x = draw(2, 40).index_put_((torch.tensor([0]), torch.tensor([3])), torch.tensor(bad))
        assert not kernels.rms_norm(x, torch.ones(40), EPS)[0].isfinite().all()
        assert not kernels.swiglu(x, draw(2, 40)).isfinite().all()
        assert kernels.rms_norm(x, torch.ones(40), EPS)[1].isfinite().all()
    assert kernels.gelu(torch.tensor([float("nan")])).isnan().all()


def test_activations_hold_at_the_ends_of_float32() -> None:
    x = torch.tensor([-1e4, -90.0, -80.0, 0.0, 90.0, 1e4])
    torch.testing.assert_close(kernels.swiglu(x, torch.ones(7)), functional.silu(x), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(kernels.gelu(x), functional.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-30)


def test_a_layer_with_a_hook_is_called() -> None:
    layer = Linear(8, 8, bias=False)
    assert layer.bare
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not layer.bare
    assert not Linear(8, 8).bare
