"""One run on 1, 2, 3 and 4 workers: the same weights to the bit, and the gradient of the whole batch."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from raymill.dataset.loader import Batch
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.losses import next_token
from raymill.training.parallel.replicated import Replicated
from raymill.training.parallel.worker import Worker

VOCAB, LENGTH, STEPS = 64, 8, 4
MICROBATCHES = (4, 6, 8)
ALONE = Worker(0, 1, torch.device("cpu"))


def settings(num_microbatches: int, dropout: float = 0.1) -> TrainingConfig:
    model = ModelConfig(
        num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, hidden_dim=24, max_seq_len=LENGTH, dropout=dropout
    )
    return TrainingConfig(model=model, global_batch_size=2 * num_microbatches, microbatch_size=2)


def batch(step: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + number)
    ids_BT = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=generator)
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.zeros(2, LENGTH, dtype=torch.int64))


def batches(placement: Replicated, step: int) -> Iterator[Batch]:
    return (batch(step, number) for number in placement.microbatches())


def first_model(config: TrainingConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config.model, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def run(config: TrainingConfig, worker: Worker) -> dict[str, Tensor]:
    """Weights after some steps, and each step's loss and gradient norm."""
    model = first_model(config).train()
    placement = Replicated(model, worker, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    learned = config.global_batch_size * LENGTH
    figures = []
    for step in range(STEPS):
        loss = placement.backward(batches(placement, step), learned, step)
        figures.append(torch.stack([loss, placement.gradient_norm()]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {**{name: tensor.detach() for name, tensor in model.named_parameters()}, "figures": torch.stack(figures)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[dict[str, Tensor]]]:
    """What every rank ended with, by worker count and microbatches. Four processes serve all counts: spawning is slow."""
    folder = tmp_path_factory.mktemp("workers")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_run_all, args=(rank, folder)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    return {
        (world_size, count): [torch.load(folder / f"{world_size}-{count}-{rank}.pt") for rank in range(world_size)]
        for world_size in (2, 3, 4)
        for count in MICROBATCHES
    }


def _run_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world_size in (4, 3, 2):
        if rank >= world_size:
            continue
        meeting = f"file://{folder}/meeting-{world_size}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        for count in MICROBATCHES:
            result = run(settings(count), Worker.current(torch.device("cpu")))
            torch.save(result, folder / f"{world_size}-{count}-{rank}.pt")
        dist.destroy_process_group()


@pytest.mark.parametrize("count", MICROBATCHES)
def test_any_number_of_workers_gives_the_same_bits(
    results: dict[tuple[int, int], list[dict[str, Tensor]]], count: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run(settings(count), ALONE)
    torch.set_num_threads(threads)
    for world_size in (2, 3, 4):
        for result in results[world_size, count]:
            differing = [name for name, tensor in alone.items() if not _same_bits(tensor, result[name])]
            assert not differing, (world_size, differing)


def test_the_gradient_is_that_of_the_whole_batch() -> None:
    config = settings(6, dropout=0.0)
    model = first_model(config)
    placement = Replicated(model, ALONE, config)
    learned = config.global_batch_size * LENGTH
    loss = placement.backward(batches(placement, 0), learned, 0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = placement.gradient_norm()
    model.zero_grad()
    whole = [batch(0, number) for number in range(6)]
    inputs_BT, targets_BT, documents_BT = (
        torch.cat([getattr(each, name) for each in whole]) for name in ("inputs_BT", "targets_BT", "documents_BT")
    )
    expected = model(inputs_BT, documents_BT, next_token(targets_BT)) / learned
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert norm.item() == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)


def test_what_dropout_drops_depends_on_the_step_alone() -> None:
    config = settings(4, dropout=0.5)
    model = first_model(config).train()
    placement = Replicated(model, ALONE, config)
    losses = []
    for step in (0, 1, 0):
        torch.rand(3)  # what else draws numbers must not matter
        losses.append(placement.backward(batches(placement, 0), 64, step).item())
        model.zero_grad()
    assert losses[0] == losses[2] != losses[1]


def test_one_microbatch_adds_nothing() -> None:
    config = settings(1)
    model = first_model(config)
    placement = Replicated(model, ALONE, config)
    loss = placement.backward(batches(placement, 0), 16, 0)
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def test_a_cpu_trains_in_bf16_at_a_width_that_compiled_paths_take() -> None:
    shape = ModelConfig(num_layers=2, model_dim=256, num_heads=4, num_kv_heads=2, hidden_dim=512, max_seq_len=64)
    ids_BT = torch.arange(4 * 65).view(4, 65) * 7 % VOCAB
    rows = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.zeros(4, 64, dtype=torch.int64))
    steps = []
    for precision in ("fp32", "bf16"):
        config = TrainingConfig(model=shape, global_batch_size=4, microbatch_size=4, precision=precision)
        model = Transformer(shape, VOCAB)
        model.initialize(0)
        placement = Replicated(model, ALONE, config)
        loss = placement.backward(iter([rows]), 4 * 64, 0).item()
        steps.append([loss, placement.gradient_norm().item()])
    assert steps[1] == pytest.approx(steps[0], rel=0.02)
    assert steps[1] != steps[0]
