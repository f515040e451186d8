"""Every layout trains as one process does: losses, gradient norms and weights; checkpoints go from one to another.

Groups of 2 and of 4 gloo processes (slow: of 8) run all cases one after the other; the tests look at what they left.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from raymill.config import override
from raymill.dataset.loader import IGNORE, Batch
from raymill.errors import UsageError
from raymill.model.config import Architecture, ModelConfig
from raymill.model.int8 import supports_int8
from raymill.model.transformer import Transformer
from raymill.training.config import LayoutConfig, TrainingConfig
from raymill.training.optimizer import build_optimizer
from raymill.training.parallel.choice import check_placement, placement_for
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
EIGHT: dict[str, dict[str, Any]] = {
    "fsdp x tensor x pipeline": {"data": "fsdp", "tensor": 2, "pipeline": 2},
    "ddp x tensor x pipeline": {"tensor": 2, "pipeline": 2},
    "hsdp x tensor": {"data": "hsdp", "shard": 2, "tensor": 2},
    "hsdp x context": {"data": "hsdp", "shard": 2, "context": 2},
    "tensor x pipeline x context": {"tensor": 2, "pipeline": 2, "context": 2},
    "fsdp x tensor x context": {"data": "fsdp", "tensor": 2, "context": 2},
    "fsdp x pipeline x context": {"data": "fsdp", "pipeline": 2, "context": 2},
    "ddp x tensor x context": {"tensor": 2, "context": 2},
    "ddp x pipeline x context": {"pipeline": 2, "context": 2},
}
WORKERS = dict.fromkeys(TWO, 2) | dict.fromkeys(FOUR, 4)
LAYOUTS = TWO | FOUR


def settings(architecture: str, layout: dict[str, Any], **more: Any) -> TrainingConfig:
    model = ModelConfig(
        architecture=cast(Architecture, architecture),
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=4 if architecture == "gpt2" else 2,
        hidden_dim=48,
        max_seq_len=LENGTH,
        tie_embeddings=architecture != "llama",
        sliding_window=5 if architecture == "mistral" else None,
    )
    config = TrainingConfig(model=model, global_batch_size=8, microbatch_size=2, layout=LayoutConfig(**layout))
    return override(config, {"optimizer": {"learning_rate": 0.003}} | more)


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
        found["fsdp, muon"] = settings("llama", layouts["fsdp"], optimizer={"name": "muon", "learning_rate": 0.003})
        found["tensor, muon"] = settings("llama", layouts["tensor"], optimizer={"name": "muon", "learning_rate": 0.003})
        for name, rate in (("sgd", 0.1), ("lion", 0.001)):
            optimizer = {"name": name, "learning_rate": rate}
            found[f"fsdp, {name}"] = settings("llama", layouts["fsdp"], optimizer=optimizer)
            found[f"tensor, {name}"] = settings("llama", layouts["tensor"], optimizer=optimizer)
        again = {"activation_checkpointing": True}
        found["fsdp, activation checkpointing"] = settings("llama", layouts["fsdp"], **again)
        found["pipeline, activation checkpointing"] = settings("llama", layouts["pipeline"], **again)
        dropped = settings("llama", layouts["tensor"], optimizer={"learning_rate": 0.001})
        if supports_int8():
            found["fsdp, int8"] = settings("gpt2", layouts["fsdp"], precision="int8")
        found["tensor, dropout"] = override(dropped, {"model": {"dropout": 0.2}})
    return found


TWO_CASES, FOUR_CASES = cases(TWO), cases(FOUR)
RESUMED = "fsdp x tensor, then tensor x pipeline"
FOUR_CASES[RESUMED] = settings("qwen3", FOUR["fsdp x tensor"])
SLOW_CASES = {
    "four stages, qwen3": settings(
        "qwen3", {"pipeline": 4}, model={"num_layers": 4}, optimizer={"learning_rate": 0.001}
    ),
    "hsdp, bf16": settings("llama", FOUR["hsdp"], precision="bf16"),
    "fsdp x pipeline, bf16": settings("llama", FOUR["fsdp x pipeline"], precision="bf16"),
    "tensor x pipeline, bf16": settings("llama", FOUR["tensor x pipeline"], precision="bf16"),
    "tensor x context, gpt2": settings("gpt2", {"tensor": 2, "context": 2}),
    "pipeline x context, qwen3": settings("qwen3", {"pipeline": 2, "context": 2}),
    "fsdp x pipeline, muon": settings(
        "qwen3", FOUR["fsdp x pipeline"], optimizer={"name": "muon", "learning_rate": 0.003}
    ),
}
"""By name; a few more ways to put the same parts together."""
EIGHT_CASES = {f"{name}, llama": settings("llama", layout) for name, layout in EIGHT.items()}
"""Three axes of two workers each; hsdp is two of them."""


@dataclass
class Outcome:
    """What rank 0 saw of one case."""

    losses: list[float]
    norms: list[float]
    whole: dict[str, Tensor]
    """Weights by name, optimizer state by field/name."""
    tolerance: float
    alike: bool
    """Whether every worker had the same bits of losses and norms, and found what was gathered in its place again."""


Alone = Callable[[TrainingConfig], Outcome]


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


def train(config: TrainingConfig, worker: Worker, then: TrainingConfig | None = None) -> Outcome:
    """STEPS steps; with `then`, the second half of them in another layout, from what the first one gathered."""
    halfway = STEPS if then is None else STEPS // 2
    run = Run(config, worker)
    run.take_steps(0, halfway)
    outcome = run.outcome()
    if then is not None:
        run = Run(then, worker, outcome.whole)
        run.take_steps(halfway, STEPS)
        rest = run.outcome()
        outcome = replace(rest, losses=outcome.losses + rest.losses, norms=outcome.norms + rest.norms)
    return outcome


class Run:
    """One model in one layout."""

    def __init__(self, config: TrainingConfig, worker: Worker, whole: dict[str, Tensor] | None = None) -> None:
        self.worker = worker
        model = Transformer(config.model, VOCAB)
        model.initialize(0)
        if whole is not None:
            model.load_state_dict({name: whole[name] for name, _ in model.named_parameters()}, strict=False)
        self.placement = placement_for(config, model, worker)
        self.optimizer = build_optimizer(self.placement.model, config.optimizer)
        self.losses: list[float] = []
        self.norms: list[float] = []
        parameters = dict(self.placement.model.named_parameters())
        for key, tensor in (whole or {}).items():
            field, _, name = key.partition("/")
            if name in parameters:
                self.optimizer.state[parameters[name]][field] = self.placement.place(name, tensor, parameters[name])

    def take_steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            batches, learned = step_of(step)
            mine = iter([batches[number] for number in self.placement.microbatches()])
            self.losses.append(self.placement.backward(mine, learned, step).item())
            self.norms.append(self.placement.gradient_norm().item())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def outcome(self) -> Outcome:
        tensors: dict[str, Tensor] = dict(self.placement.model.named_parameters())
        for name, parameter in self.placement.model.named_parameters():
            tensors |= {f"{field}/{name}": tensor for field, tensor in self.optimizer.state[parameter].items()}
        whole = [{name: tensor.detach().clone() for name, tensor in self.placement.gather(tensors).items()}]
        if self.worker.world_size > 1:
            dist.broadcast_object_list(whole, src=0)
        places = (numbers(self.placement.place(name, whole[0][name], tensor)) for name, tensor in tensors.items())
        placed = all(torch.equal(one, numbers(other)) for one, other in zip(places, tensors.values(), strict=True))
        seen: list[Any] = [(self.losses, self.norms, placed)] * self.worker.world_size
        if self.worker.world_size > 1:
            dist.all_gather_object(seen, (self.losses, self.norms, placed))
        alike = all(each == (self.losses, self.norms, True) for each in seen)
        return Outcome(self.losses, self.norms, whole[0], self.placement.tolerance, alike)


def numbers(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def work(rank: int, count: int, configs: dict[str, TrainingConfig], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    outcomes: dict[str, Outcome | str] = {}
    for name, config in configs.items():
        try:
            then = settings("qwen3", FOUR["tensor x pipeline"]) if name == RESUMED else None
            outcomes[name] = train(config, Worker.current(CPU), then)
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
    deadline = time.monotonic() + (300 if count < 8 else 900)
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
def alone() -> Iterator[Alone]:
    """One process with the same settings but the layout; its thread count is that of the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    known: dict[str, Outcome] = {}

    def outcome(config: TrainingConfig) -> Outcome:
        config = config.model_copy(update={"layout": LayoutConfig()})
        key = config.model_dump_json()
        if key not in known:
            known[key] = train(config, ALONE)
        return known[key]

    yield outcome
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(2, TWO_CASES, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(4, FOUR_CASES, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(4, SLOW_CASES, tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    return run_workers(8, EIGHT_CASES, tmp_path_factory.mktemp("eight"))


@pytest.mark.parametrize("case", TWO_CASES)
def test_two_workers_train_as_one(case: str, two: dict[str, Outcome | str], alone: Alone) -> None:
    compare(case, two, alone(TWO_CASES[case]))


@pytest.mark.parametrize("case", FOUR_CASES)
def test_four_workers_train_as_one(case: str, four: dict[str, Outcome | str], alone: Alone) -> None:
    compare(case, four, alone(FOUR_CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_more_ways_to_train_as_one(case: str, slow: dict[str, Outcome | str], alone: Alone) -> None:
    compare(case, slow, alone(SLOW_CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT_CASES)
def test_eight_workers_on_three_axes_train_as_one(case: str, eight: dict[str, Outcome | str], alone: Alone) -> None:
    compare(case, eight, alone(EIGHT_CASES[case]))


def compare(case: str, outcomes: dict[str, Outcome | str], expected: Outcome) -> None:
    outcome = outcomes.get(case, "did not run")
    assert isinstance(outcome, Outcome), outcome
    difference = max(abs(one - other) for one, other in zip(outcome.losses, expected.losses, strict=True))
    print(f"{case:40} {difference:.1e} of {outcome.tolerance:.0e} nats")
    assert difference <= outcome.tolerance
    assert outcome.alike
    assert outcome.whole.keys() == expected.whole.keys()
    if "bf16" in case:
        return
    assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
    for name, tensor in expected.whole.items():
        torch.testing.assert_close(outcome.whole[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "more", "what"),
    [
        ({"pipeline": 2}, {"microbatch_size": 8}, "1 microbatches do not fill 2 pipeline stages"),
        ({}, {"precision": "int8", "compile": True}, "int8 does not go with train.compile"),
        ({"data": "fsdp"}, {"precision": "fp8"}, "fp8 needs a GPU of compute capability 8.9"),
    ],
)
def test_what_does_not_go_together_is_refused(layout: dict[str, Any], more: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        check_placement(settings("llama", layout, **more), Worker(0, 2, CPU))
    assert "set train." in error.value.fix
