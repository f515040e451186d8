"""Against the singular value decomposition, which is the definition; and bits that depend on nothing else."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from raymill.training.orthogonal import COEFFICIENTS, cost, orthogonalize

SHAPES = ((24, 24), (10, 33), (64, 20), (200, 256), (384, 384), (192, 512))
"""Square and not, both ways round, with and without strips, on either side of L = 1.5 S."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits hold for a number of threads; one is also what a busy machine is quickest with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Singular values from 1 down to 0.001, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u @ torch.diag(torch.logspace(0, -3, min(shape), dtype=torch.float64)) @ v).float()


def by_decomposition(x: Tensor) -> Tensor:
    """The polynomials on the singular values themselves, in float64."""
    u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
    values /= values.pow(4).sum() ** 0.25
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomials_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = matrix(shape)
    (found,) = orthogonalize([x])
    torch.testing.assert_close(found.double(), by_decomposition(x), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_down_to_a_fortieth_come_near_one(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(matrix(shape), full_matrices=False)
    (found,) = orthogonalize([u @ torch.diag(torch.logspace(0, -1.6, min(shape))) @ v])
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_a_result_do_not_depend_on_its_neighbours(shape: tuple[int, int]) -> None:
    matrices = [matrix(shape, seed) for seed in range(5)] + [matrix((12, 12))]
    together = orthogonalize(matrices)
    for x, found in zip(matrices, together, strict=True):
        assert torch.equal(orthogonalize([x])[0], found)
    backwards = orthogonalize(matrices[::-1])
    assert all(map(torch.equal, backwards, together[::-1]))


def test_a_view_into_a_larger_buffer_gives_the_bits_of_a_copy() -> None:
    x = matrix((50, 70))
    buffer = torch.zeros(3501)
    buffer[1:] = x.flatten()
    view = buffer[1:].view(50, 70)
    assert torch.equal(orthogonalize([view])[0], orthogonalize([x])[0])


@pytest.mark.parametrize("factor", (1e-8, 1e8))
def test_the_size_of_the_gradient_does_not_matter(factor: float) -> None:
    x = matrix((48, 96))
    torch.testing.assert_close(orthogonalize([factor * x])[0], orthogonalize([x])[0], atol=1e-3, rtol=0)


def test_a_gradient_of_zero_moves_nothing() -> None:
    for shape in ((8, 8), (8, 40)):
        assert torch.equal(orthogonalize([torch.zeros(shape)])[0], torch.zeros(shape))


def test_what_is_given_stays_as_it_was() -> None:
    for shape in SHAPES:
        x = matrix(shape)
        before = x.clone()
        orthogonalize([x])
        assert torch.equal(x, before)


def test_the_cost_of_lying_and_standing_is_one() -> None:
    assert cost(3, 5) == cost(5, 3) < cost(5, 5)


def test_stacks_give_every_matrix_its_own_shape_back() -> None:
    """Without values: where nothing is computed, matrices are stacked as on a GPU."""
    shapes = [(8, 20), (20, 8), (8, 8), (8, 20), (3, 5)]
    found = orthogonalize([torch.empty(shape, device="meta") for shape in shapes])
    assert [tuple(each.shape) for each in found] == shapes


@pytest.mark.gpu
def test_stacks_on_a_gpu_give_what_a_cpu_gives() -> None:
    matrices = [matrix(shape, seed) for shape in SHAPES for seed in range(3)]
    found = orthogonalize([each.cuda() for each in matrices])
    for here, there in zip(orthogonalize(matrices), found, strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=5e-3, rtol=0)
