"""The tree that fixes the order of additions: what a worker holds of it, and that it can be put together."""

import pytest
import torch
from torch import Tensor, nn

from raymill.training.parallel.reduction import Reduction, nodes_inside, run_of, split, sum_scalars


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_leaves", [5, 6, 7, 8, 12])
def test_runs_cover_all_leaves_and_differ_by_at_most_one(world_size: int, num_leaves: int) -> None:
    runs = [run_of(rank, world_size, num_leaves) for rank in range(world_size)]
    assert [leaf for run in runs for leaf in run] == list(range(num_leaves))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_node_has_the_largest_power_of_two_below_its_size_on_its_left() -> None:
    sizes = {count: len(split(range(count))[0]) for count in (2, 3, 4, 5, 6, 7, 8, 9)}
    assert sizes == {2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 8: 4, 9: 8}


def test_a_run_of_a_power_of_two_holds_one_node() -> None:
    assert nodes_inside(range(4, 8), range(16)) == [range(4, 8)]


def test_a_run_across_the_middle_holds_few_nodes() -> None:
    assert nodes_inside(range(3, 7), range(8)) == [range(3, 4), range(4, 6), range(6, 7)]
    assert len(nodes_inside(range(1, 1023), range(1024))) == 18


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 6, 7, 8])
def test_gradients_of_one_worker_are_added_along_the_tree(num_leaves: int) -> None:
    generator = torch.Generator().manual_seed(3)
    leaves = torch.randn(num_leaves, 5, generator=generator) * 10 ** torch.randn(num_leaves, 5, generator=generator)
    parameter = nn.Parameter(torch.zeros(5))
    seen = []

    def leaf(number: int) -> None:
        seen.append(number)
        (parameter * leaves[number]).sum().backward()

    Reduction([parameter], 0, 1, num_leaves).sum(leaf)
    assert seen == list(range(num_leaves))
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, _by_hand(leaves))


def test_the_order_of_scalars_is_the_same_tree() -> None:
    # Added one after the other, the small ones vanish beside the large one.
    values = torch.tensor([2.0**24, 1.0, 1.0, 1.0])
    assert sum_scalars(values).item() == 2.0**24 + 2
    assert values.tolist() == [2.0**24, 1.0, 1.0, 1.0]


def _by_hand(leaves: Tensor) -> Tensor:
    """The definition, written another way: blocks of powers of two from the left, the rest added from the right."""
    blocks: list[Tensor] = []
    start = 0
    while start < len(leaves):
        size = 1 << ((len(leaves) - start).bit_length() - 1)
        rows = list(leaves[start : start + size])
        while len(rows) > 1:
            rows = [rows[at] + rows[at + 1] for at in range(0, len(rows), 2)]
        blocks.append(rows[0])
        start += size
    total = blocks.pop()
    while blocks:
        total = blocks.pop() + total
    return total
