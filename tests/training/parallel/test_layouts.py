"""Every layout trains as one process does: losses, gradient norms and weights; checkpoints go from one to another.

Two groups of gloo processes, of 2 and of 4, run all cases one after the other; the tests look at what they left.
"""

import multiprocessing
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from raymill.config import override
from raymill.dataset.loader import IGNORE, Batch
from raymill.errors import UsageError
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.optimizer import build_optimizer
from raymill.training.parallel.choice import check_placement, placement_for
from raymill.training.parallel.placement import Placement
from raymill.training.parallel.worker import Worker

VOCAB, LENGTH, STEPS = 67, 16, 4
CPU = torch.device("cpu")
ALONE = Worker(0, 1, CPU)

TWO: dict[str, dict[str, Any]] = {
    "fsdp": {"data": "fsdp"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "context": {"context": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "hsdp": {"data": "hsdp", "shard": 2},
    "fsdp x tensor": {"data": "fsdp", "tensor": 2},
    "ddp x tensor": {"tensor": 2},
    "ddp x pipeline": {"pipeline": 2},
    "fsdp x pipeline": {"data": "fsdp", "pipeline": 2},
    "tensor x pipeline": {"tensor": 2, "pipeline": 2},
    "ddp x context": {"context": 2},
    "fsdp x context": {"data": "fsdp", "context": 2},
}
WORKERS = dict.fromkeys(TWO, 2) | dict.fromkeys(FOUR, 4)
LAYOUTS = TWO | FOUR


def settings(architecture: str, layout: dict[str, Any], **more: Any) -> TrainingConfig:
    model = ModelConfig(
        architecture=architecture,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=4 if architecture == "gpt2" else 2,
        hidden_dim=48,
        max_seq_len=LENGTH,
        tie_embeddings=architecture != "llama",
        sliding_window=5 if architecture == "mistral" else None,
    )
    config = TrainingConfig(model=model, global_batch_size=8, microbatch_size=2, layout=layout)
    return override(config, {"optimizer": {"learning_rate": 0.01}} | more)


def cases(layouts: dict[str, dict[str, Any]]) -> dict[str, TrainingConfig]:
    """All layouts with llama; qwen3, gpt2 and mistral with those that treat their parts apart."""
    found = {f"{name}, llama": settings("llama", layout) for name, layout in layouts.items()}
    for name in ("fsdp", "tensor", "pipeline", "context", "fsdp x tensor", "tensor x pipeline"):
        if name in layouts:
            for architecture in ("qwen3", "gpt2"):
                found[f"{name}, {architecture}"] = settings(architecture, layouts[name])
    for name in ("context", "tensor"):
        if name in layouts:
            found[f"{name}, mistral"] = settings("mistral", layouts[name])
    if "fsdp" in layouts:
        found["fsdp, muon"] = settings("llama", layouts["fsdp"], optimizer={"name": "muon", "learning_rate": 0.01})
        found["tensor, muon"] = settings("llama", layouts["tensor"], optimizer={"name": "muon", "learning_rate": 0.01})
        again = {"activation_checkpointing": True}
        found["fsdp, activation checkpointing"] = settings("llama", layouts["fsdp"], **again)
        found["pipeline, activation checkpointing"] = settings("llama", layouts["pipeline"], **again)
        dropped = settings("llama", layouts["tensor"], optimizer={"learning_rate": 0.001})
        found["tensor, dropout"] = override(dropped, {"model": {"dropout": 0.2}})
    return found


TWO_CASES, FOUR_CASES = cases(TWO), cases(FOUR)


@dataclass
class Outcome:
    """What rank 0 saw of one case."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    tolerance: float
    alike: bool
    """Whether every worker had the same bits of losses and norms."""
    placed: bool
    """Whether weights and optimizer state, gathered and placed again, were on every worker what they had been."""


def step_of(number: int) -> tuple[list[Batch], int]:
    """Four microbatches of documents, a fifth of whose targets are not learned."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB, (8, LENGTH + 1), generator=generator)
    targets_BT = ids[:, 1:].clone()
    targets_BT[torch.rand(8, LENGTH, generator=generator) < 0.2] = IGNORE
    documents_BT = (torch.rand(8, LENGTH, generator=generator) < 0.2).long().cumsum(1)
    batches = [
        Batch(ids[row : row + 2, :-1], targets_BT[row : row + 2], documents_BT[row : row + 2]) for row in (0, 2, 4, 6)
    ]
    return batches, int((targets_BT != IGNORE).sum())


def train(config: TrainingConfig, worker: Worker) -> Outcome:
    model = Transformer(config.model, VOCAB)
    model.initialize(0)
    placement = placement_for(config, model, worker)
    optimizer = build_optimizer(placement.model, config.optimizer)
    losses, norms = [], []
    for step in range(STEPS):
        batches, learned = step_of(step)
        loss = placement.backward(iter([batches[number] for number in placement.microbatches()]), learned, step)
        losses.append(loss.item())
        norms.append(placement.gradient_norm().item())
        optimizer.step()
        for parameter in placement.model.parameters():
            parameter.grad = None
    seen: list[Any] = [(losses, norms)]
    if worker.world_size > 1:
        seen = [None] * worker.world_size
        dist.all_gather_object(seen, (losses, norms))
    weights, placed = check_places(placement, optimizer, worker)
    return Outcome(losses, norms, weights, placement.tolerance, all(each == seen[0] for each in seen), placed)


def check_places(
    placement: Placement, optimizer: torch.optim.Optimizer, worker: Worker
) -> tuple[dict[str, Tensor], bool]:
    """The whole weights, and whether all that was gathered finds its place again."""
    tensors: dict[str, Tensor] = dict(placement.model.named_parameters())
    likes = dict(tensors)
    for name, parameter in placement.model.named_parameters():
        for field, tensor in optimizer.state[parameter].items():
            tensors[f"{field}/{name}"], likes[f"{field}/{name}"] = tensor, tensor
    whole = [{name: tensor.detach().clone() for name, tensor in placement.gather(tensors).items()}]
    if worker.world_size > 1:
        dist.broadcast_object_list(whole, src=0)
    placed = all(
        torch.equal(numbers(placement.place(name, whole[0][name], likes[name])), numbers(tensor))
        for name, tensor in tensors.items()
    )
    verdicts: list[Any] = [placed]
    if worker.world_size > 1:
        verdicts = [None] * worker.world_size
        dist.all_gather_object(verdicts, placed)
    return {name: tensor for name, tensor in whole[0].items() if "/" not in name}, all(verdicts)


def numbers(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def work(rank: int, count: int, configs: dict[str, TrainingConfig], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    outcomes: dict[str, Outcome | str] = {}
    for name, config in configs.items():
        try:
            outcomes[name] = train(config, Worker.current(CPU))
        except Exception:
            outcomes[name] = traceback.format_exc()
            break
    if rank == 0 or isinstance(outcomes[name], str):
        torch.save(outcomes, folder / f"outcomes-{rank}.pt")
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def run_workers(count: int, configs: dict[str, TrainingConfig], folder: Path) -> dict[str, Outcome | str]:
    """All cases in one group of processes; a case that fails in one worker ends the group."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, count, configs, folder)) for rank in range(count)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 300
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        if list(folder.glob("outcomes-[1-9].pt")):  # one has failed, the others may wait for it
            time.sleep(1)
            break
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
        worker.join()
    outcomes: dict[str, Outcome | str] = {}
    for path in sorted(folder.glob("outcomes-*.pt")):
        outcomes |= torch.load(path, weights_only=False)
    return outcomes


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Outcome]]:
    """One process, for each case; its thread count is that of the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    configs = {
        name: override(config, {"layout": {"data": "ddp", "shard": None, "tensor": 1, "pipeline": 1, "context": 1}})
        for name, config in (TWO_CASES | FOUR_CASES).items()
    }
    known: dict[str, Outcome] = {}
    outcomes = {}
    for name, config in configs.items():
        key = config.model_dump_json()
        if key not in known:
            known[key] = train(config, ALONE)
        outcomes[name] = known[key]
    yield outcomes
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(2, TWO_CASES, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(4, FOUR_CASES, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("case", TWO_CASES)
def test_two_workers_train_as_one(case: str, two: dict[str, Outcome | str], alone: dict[str, Outcome]) -> None:
    compare(case, two, alone)


@pytest.mark.parametrize("case", FOUR_CASES)
def test_four_workers_train_as_one(case: str, four: dict[str, Outcome | str], alone: dict[str, Outcome]) -> None:
    compare(case, four, alone)


def compare(case: str, outcomes: dict[str, Outcome | str], alone: dict[str, Outcome]) -> None:
    outcome, expected = outcomes.get(case, "did not run"), alone[case]
    assert isinstance(outcome, Outcome), outcome
    difference = max(abs(one - other) for one, other in zip(outcome.losses, expected.losses, strict=True))
    print(f"{case:40} {difference:.1e} of {outcome.tolerance:.0e} nats")
    assert difference <= outcome.tolerance
    assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
    assert outcome.alike and outcome.placed
    assert outcome.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(outcome.weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "more", "what"),
    [
        ({"pipeline": 2}, {"microbatch_size": 8}, "1 microbatches do not fill 2 pipeline stages"),
        ({"data": "fsdp"}, {"precision": "fp8"}, "fp8 needs a GPU of compute capability 8.9"),
    ],
)
def test_what_does_not_go_together_is_refused(layout: dict[str, Any], more: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        check_placement(settings("llama", layout, **more), Worker(0, 2, CPU))
    assert "set train." in error.value.fix
