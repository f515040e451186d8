"""The orthogonal matrix nearest to a matrix, nearly: each singular value x becomes p3(p2(p1(x))), which is close to 1.

p is a x + b x^3 + c x^5, and where X has the singular value x, (X X^T)^k X has x^(2k + 1): products of matrices, no
decomposition (Newton-Schulz; for Muon, Jordan 2024). Each p is the one that comes closest to 1 on the interval that
those before it leave (Polar Express, Amsel et al. 2025).

All the cost is products of S x S with S x S or S x L. Three things lower it:
- X X^T and its polynomials are symmetric: on CPUs one half is computed, in strips, and the other copied.
- Where L >= 1.5 S the polynomials are multiplied on the S x S side, and X once, by their product.
- The norm of X X^T, which costs no product of its own, bounds the largest singular value tighter than that of X.
Matrices of one shape go through a GPU stacked. On a CPU each goes alone: stacking gains nothing there, and the bits of
a result must not depend on its neighbours.

Shapes: S short side, L long side, N matrices of one shape; on CPUs the leading N is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
"""a, b, c of p1, p2, p3: 0.01 to 1 becomes 0.73 to 1.27, what is below 78 x. Jordan's five steps lift what is below further,
485 x, for half as much work again. Measured of losses (DECISIONS): one seed of one small model at two learning rates, where
the best with three is level with the best with five, and three are worse at the higher rate. Other seeds, larger models
and longer runs were not compared: whether three lose something there is not known."""
_STRIP = 96
"""Rows of a strip of a symmetric product: 0.74 of the whole product's time at S = 384, 0.65 at 768."""
_STACKED_ENTRIES = 1 << 26
"""Entries that are stacked at once on a GPU: 256 MiB, and about four times that while they are worked on."""


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix with its singular values near 1. Those below a hundredth of the largest stay smaller, those below a
    fortieth where many are large."""
    done: dict[int, Tensor] = {}
    for indices in _stacks(matrices):
        short = [matrices[index].mT if _is_tall(matrices[index]) else matrices[index] for index in indices]
        if len(short) == 1:
            results: Sequence[Tensor] = [_orthogonalize(short[0].contiguous())]
        else:
            results = _orthogonalize(torch.stack(short)).unbind()
        for index, result in zip(indices, results, strict=True):
            done[index] = result.mT if _is_tall(matrices[index]) else result
    return [done[index] for index in range(len(matrices))]


def cost(rows: int, columns: int) -> int:
    """Something proportional to the work on one matrix, for sharing work out."""
    short, long = sorted((rows, columns))
    return short * short * (short + long)


def _orthogonalize(x_SL: Tensor) -> Tensor:
    gram_SS = _symmetric_product(x_SL, x_SL.mT)
    # Two divisions: the norm squares the entries of X to the fourth power, which leaves float32's range below 1e-10.
    trace = gram_SS.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-25)
    gram_SS /= trace
    norm = gram_SS.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
    gram_SS /= norm
    shrink = (trace * norm).rsqrt()
    short, long = x_SL.shape[-2:]
    if 2 * long >= 3 * short:
        return _product_of_polynomials(gram_SS).mul_(shrink) @ x_SL
    x_SL = x_SL * shrink
    for index, coefficients in enumerate(COEFFICIENTS):
        if index:
            gram_SS = _symmetric_product(x_SL, x_SL.mT)
        x_SL = _polynomial(gram_SS, coefficients) @ x_SL
    return x_SL


def _product_of_polynomials(gram_SS: Tensor) -> Tensor:
    """What all steps together multiply X by. A step makes of A = X X^T the matrix P A P, all of which commute."""
    product_SS = _polynomial(gram_SS, COEFFICIENTS[0])
    step_SS = product_SS
    for coefficients in COEFFICIENTS[1:]:
        gram_SS = _symmetric_product(step_SS, _symmetric_product(step_SS, gram_SS))
        step_SS = _polynomial(gram_SS, coefficients)
        product_SS = _symmetric_product(step_SS, product_SS)
    return product_SS


def _polynomial(gram_SS: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a + b A + c A^2."""
    a, b, c = coefficients
    result_SS = _symmetric_product(gram_SS, gram_SS).mul_(c).add_(gram_SS, alpha=b)
    result_SS.diagonal(dim1=-2, dim2=-1).add_(a)
    return result_SS


def _symmetric_product(left_SK: Tensor, right_KS: Tensor) -> Tensor:
    """left @ right where the result is known to be symmetric."""
    size = left_SK.shape[-2]
    count = size // _STRIP
    if left_SK.ndim == 3 or left_SK.device.type != "cpu" or count < 2:
        return left_SK @ right_KS
    result_SS = left_SK.new_empty(size, size)
    for index in range(count):
        start, stop = size * index // count, size * (index + 1) // count
        torch.mm(left_SK[start:stop], right_KS[:, start:], out=result_SS[start:stop, start:])
        result_SS[stop:, start:stop] = result_SS[start:stop, stop:].mT
    return result_SS


def _stacks(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Which matrices are worked on together: on GPUs those of one shape, one lying or standing; on CPUs each alone."""
    if not matrices or matrices[0].device.type == "cpu":
        return [[index] for index in range(len(matrices))]
    stacks: dict[tuple[int, ...], list[list[int]]] = {}
    for index, matrix in enumerate(matrices):
        room = max(1, _STACKED_ENTRIES // matrix.numel())
        same = stacks.setdefault(tuple(sorted(matrix.shape)), [])
        if not same or len(same[-1]) == room:
            same.append([])
        same[-1].append(index)
    return [stack for same in stacks.values() for stack in same]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
