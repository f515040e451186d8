"""A matrix's update by its definition, and the same bits from workers that share the work or hold pieces."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from raymill.training.config import OptimizerConfig
from raymill.training.muon import share_out
from raymill.training.optimizer import build_optimizer
from raymill.training.orthogonal import orthogonalize

SHAPES = ((16, 16), (16, 40), (40, 16), (7, 24), (16, 16))
CONFIG = OptimizerConfig(name="muon", learning_rate=0.02, momentum=0.9, weight_decay=0.3)
STEPS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits hold for a number of threads; one is also what a busy machine is quickest with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    def __init__(self, shapes: tuple[tuple[int, int], ...] = SHAPES) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ParameterList(nn.Parameter(drawn(shape, seed)) for seed, shape in enumerate(shapes))
        self.lm_head = nn.Parameter(drawn((12, 16), 99))


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    return drawn(shape, 1000 * step + sum(name.encode()))


def run(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The whole weights after some steps of given gradients, and the momentum."""
    optimizer = build_optimizer(model, CONFIG, group)
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            whole = gradient(name, tuple(parameter.shape), step)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        optimizer.step()
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found |= {f"{name} momentum": optimizer.state[p]["momentum"] for name, p in model.model.layers.named_parameters()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}


def test_two_steps_are_nesterovs_momentum_made_orthogonal() -> None:
    model = Model(((8, 20),))
    weight = model.model.layers[0]
    before = weight.detach().clone()
    optimizer = build_optimizer(model, CONFIG)
    first, second = drawn((8, 20), 5), drawn((8, 20), 6)
    mean = 0.1 * first
    expected = before * (1 - 0.02 * 0.3) - 0.02 * 0.2 * 20**0.5 * orthogonalize([0.1 * first + 0.9 * mean])[0]
    mean = 0.9 * mean + 0.1 * second
    expected = expected * (1 - 0.02 * 0.3) - 0.02 * 0.2 * 20**0.5 * orthogonalize([0.1 * second + 0.9 * mean])[0]
    for each in (first, second):
        weight.grad = each
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], mean)


@pytest.mark.parametrize("shape", ((64, 64), (32, 128), (128, 32)))
def test_an_update_has_the_root_mean_square_of_adamws(shape: tuple[int, int]) -> None:
    model = Model((shape,))
    weight = model.model.layers[0]
    before = weight.detach().clone()
    weight.grad = drawn(shape, 5)
    build_optimizer(model, OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0)).step()
    moved = (weight.detach() - before).square().mean().sqrt()
    assert moved / 0.01 == pytest.approx(0.2, rel=0.25)


def test_an_update_does_not_depend_on_the_other_matrices() -> None:
    together = run(Model())
    alone = run(Model(SHAPES[:1]))
    assert torch.equal(alone["model.layers.0"], together["model.layers.0"])


def test_a_matrix_without_gradient_stays() -> None:
    model = Model()
    before = model.model.layers[0].detach().clone()
    build_optimizer(model, CONFIG).step()
    assert torch.equal(model.model.layers[0], before)


def test_work_is_shared_out_whole_and_evenly() -> None:
    parts = share_out([5, 1, 4, 4, 1, 1], 3)
    assert sorted(index for part in parts for index in part) == list(range(6))
    assert sorted(sum([5, 1, 4, 4, 1, 1][index] for index in part) for part in parts) == [5, 5, 6]
    assert share_out([3], 2) == [[0], []]


def test_two_workers_that_share_or_shard_have_the_bits_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    expected = run(Model())
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert set(results) == {"shared", "one each", "rows", "columns", "copies", "sharded and shared"}
        for case, found in results.items():
            names = ["model.layers.0"] if case == "one each" else list(expected)
            for name in names:
                assert torch.equal(found[name], expected[name]), (case, rank, name)


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = dist.group.WORLD
    mesh = DeviceMesh("cpu", [0, 1])
    results = {
        "shared": run(Model(), world),
        "one each": run(Model(SHAPES[:1]), world),  # one of the workers has nothing to do
        "rows": run(_laid_out(mesh, Shard(0))),
        "columns": run(_laid_out(mesh, Shard(1))),
        "copies": run(_laid_out(mesh, Replicate())),
        "sharded and shared": run(_laid_out(mesh, Shard(0)), world),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _laid_out(mesh: DeviceMesh, placement: Shard | Replicate) -> Model:
    """Seven rows do not divide over two workers: one holds four, the other three."""
    model = Model()
    layers = [nn.Parameter(distribute_tensor(each.detach(), mesh, [placement])) for each in model.model.layers]
    model.model.layers = nn.ParameterList(layers)
    model.lm_head = nn.Parameter(distribute_tensor(model.lm_head.detach(), mesh, [placement]))
    return model
