"""The loop learns, counts right, and a kill changes no bit."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raymill.config import override
from raymill.dataset.loader import IGNORE, Batch, Loader
from raymill.dataset.shards import TokenStream
from raymill.errors import DataError, UsageError
from raymill.model.transformer import Transformer
from raymill.training.checkpoint import CHECKPOINTS, newest_checkpoint
from raymill.training.config import TrainingConfig
from raymill.training.loop import Hooks, train
from raymill.training.metrics import METRICS, StepMetrics
from raymill.training.parallel.worker import Worker

VOCAB = 64
ALONE = Worker(0, 1, torch.device("cpu"))


def no_validation(model: torch.nn.Module, max_sequences: int | None) -> dict[str, float]:
    return {"loss_nats": 0.0, "bits_per_byte": 0.0, "accuracy": 0.0}


HOOKS = Hooks(validate=no_validation)


def curve(folder: Path) -> list[tuple[int, float, float, float]]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"], row["learning_rate"]) for row in rows]


def last_files(folder: Path) -> dict[str, bytes]:
    found = newest_checkpoint(folder / CHECKPOINTS, pytest.fail)
    assert found is not None
    return {path.name: path.read_bytes() for path in found[0].iterdir() if path.suffix == ".safetensors"}


def test_it_learns_the_pattern(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    optimizer = config.optimizer.model_copy(update={"learning_rate": 0.02})
    config = config.model_copy(update={"steps": 60, "optimizer": optimizer})
    train(config, tokens, tmp_path, ALONE, HOOKS)
    losses = [row[1] for row in curve(tmp_path)]
    assert losses[0] > 4.0 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_it_learns_from_documents_of_which_a_part_is_not_learned(
    config: TrainingConfig, documents: Path, tmp_path: Path, packing: str
) -> None:
    optimizer = config.optimizer.model_copy(update={"learning_rate": 0.02})
    config = config.model_copy(update={"steps": 60, "optimizer": optimizer, "packing": packing})
    train(config, documents, tmp_path, ALONE, HOOKS)
    losses = [row[1] for row in curve(tmp_path)]
    assert losses[0] > 4.0 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_loss_is_the_mean_over_the_learned_targets_of_the_whole_step(
    config: TrainingConfig, documents: Path, tmp_path: Path, packing: str
) -> None:
    config = config.model_copy(update={"steps": 1, "packing": packing})
    model = Transformer(config.model, VOCAB)
    model.initialize(config.seed)
    loader = Loader(TokenStream(documents, "train"), seq_len=16, global_batch_size=8, seed=0, packing=packing)
    batch = loader.batch(0, 0, 8)
    assert (batch.targets_BT == IGNORE).all(1).any()  # a microbatch of 1 has nothing to learn
    documents_BT = batch.documents_BT
    logs_BTV = model(batch.inputs_BT, documents_BT).log_softmax(-1)
    nats = [-logs_BTV[place][target] for place, target in _learned(batch)]
    loss = torch.stack(nats).mean()
    loss.backward()
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters()))
    for microbatch_size in (1, 4, 8):
        folder = tmp_path / str(microbatch_size)
        train(config.model_copy(update={"microbatch_size": microbatch_size}), documents, folder, ALONE, HOOKS)
        (row,) = curve(folder)
        assert 20 < len(nats) < 60
        assert row[1] == pytest.approx(loss.item(), rel=1e-5)
        assert row[2] == pytest.approx(norm, rel=1e-4)


def _learned(batch: Batch) -> list[tuple[tuple[int, int], int]]:
    places = (batch.targets_BT != IGNORE).nonzero().tolist()
    return [((row, at), int(batch.targets_BT[row, at])) for row, at in places]


def test_a_step_with_nothing_to_learn_changes_no_gradient(
    config: TrainingConfig, documents: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unlearned"
    shutil.copytree(documents, folder)
    learn = folder / "train-00000.learn.bin"
    learn.write_bytes(bytes(learn.stat().st_size))
    train(config, folder, tmp_path / "run", ALONE, HOOKS)
    assert {row[1:3] for row in curve(tmp_path / "run")} == {(0.0, 0.0)}


def test_validations_on_the_way_are_short_and_the_last_is_whole(
    config: TrainingConfig, tokens: Path, tmp_path: Path
) -> None:
    asked: list[int | None] = []

    def validate(model: torch.nn.Module, max_sequences: int | None) -> dict[str, float]:
        asked.append(max_sequences)
        return {}

    train(config, tokens, tmp_path, ALONE, replace(HOOKS, validate=validate))
    assert asked == [4, None]


def test_every_step_and_checkpoint_is_told_once(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    steps: list[StepMetrics] = []
    checkpoints: list[str] = []
    hooks = replace(HOOKS, on_step=steps.append, on_checkpoint=lambda path: checkpoints.append(path.name))
    train(config, tokens, tmp_path, ALONE, hooks)
    assert [metrics.step for metrics in steps] == list(range(1, 13))
    assert steps[-1].tokens == 12 * 8 * 16
    assert checkpoints == ["step-00000004", "step-00000008", "step-00000012"]
    assert [metrics.step for metrics in steps if metrics.validation] == [6, 12]


def test_accumulated_microbatches_equal_one_large_batch(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    whole = config.model_copy(update={"microbatch_size": 8})
    small = train(config, tokens, tmp_path / "small", ALONE, HOOKS)
    large = train(whole, tokens, tmp_path / "large", ALONE, HOOKS)
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kill_at", [3, 4, 9])
def test_kill_and_resume_changes_no_bit(config: TrainingConfig, tokens: Path, tmp_path: Path, kill_at: int) -> None:
    train(config, tokens, tmp_path / "whole", ALONE, HOOKS)
    killed = multiprocessing.get_context("spawn").Process(
        target=_train_until_killed, args=(config, tokens, tmp_path / "killed", kill_at)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    train(config, tokens, tmp_path / "killed", ALONE, HOOKS)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert last_files(tmp_path / "killed") == last_files(tmp_path / "whole")


def _train_until_killed(config: TrainingConfig, tokens: Path, folder: Path, kill_at: int) -> None:
    torch.set_num_threads(torch.get_num_threads())

    def die(metrics: StepMetrics) -> None:
        if metrics.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, tokens, folder, ALONE, replace(HOOKS, on_step=die))


def test_two_workers_reach_the_weights_of_one(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    _run_workers(2, config, tokens, tmp_path, None)
    alone = train(config, tokens, tmp_path / "alone", ALONE, HOOKS)
    state = torch.load(tmp_path / "ddp.pt", weights_only=True)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(state[name], parameter, rtol=2e-3, atol=2e-5)
    assert [row[0] for row in curve(tmp_path / "ddp")] == list(range(1, 13))
    for one, other in zip(curve(tmp_path / "ddp"), curve(tmp_path / "alone"), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)


def test_two_workers_with_ignored_targets_reach_the_weights_of_one(
    config: TrainingConfig, documents: Path, tmp_path: Path
) -> None:
    config = config.model_copy(update={"packing": "best_fit"})
    _run_workers(2, config, documents, tmp_path, None)
    alone = train(config, documents, tmp_path / "alone", ALONE, HOOKS)
    state = torch.load(tmp_path / "ddp.pt", weights_only=True)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(state[name], parameter, rtol=2e-3, atol=2e-5)
    for one, other in zip(curve(tmp_path / "ddp"), curve(tmp_path / "alone"), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)


def test_four_workers_killed_and_continued_end_with_the_same_bits(
    config: TrainingConfig, tokens: Path, tmp_path: Path
) -> None:
    _run_workers(4, config, tokens, tmp_path / "whole", None)
    _run_workers(4, config, tokens, tmp_path / "killed", 6)
    _run_workers(4, config, tokens, tmp_path / "killed", None)
    assert curve(tmp_path / "killed" / "ddp") == curve(tmp_path / "whole" / "ddp")
    assert last_files(tmp_path / "killed" / "ddp") == last_files(tmp_path / "whole" / "ddp")


def _run_workers(count: int, config: TrainingConfig, tokens: Path, folder: Path, kill_at: int | None) -> None:
    """Trains with `count` gloo workers; rank 0 dies after step `kill_at`, and the others with it."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments = (count, config, tokens, folder, kill_at)
    workers = [context.Process(target=_ddp_worker, args=(rank, *arguments)) for rank in range(count)]
    for worker in workers:
        worker.start()
    workers[0].join(120)
    for worker in workers[1:]:
        if kill_at is not None:
            worker.kill()
        worker.join(120)
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert workers[0].exitcode == expected


def _ddp_worker(rank: int, count: int, config: TrainingConfig, tokens: Path, folder: Path, kill_at: int | None) -> None:
    torch.set_num_threads(1)

    def die(metrics: StepMetrics) -> None:
        if metrics.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    hooks = replace(HOOKS, on_step=die)
    model = train(config, tokens, folder / "ddp", Worker.current(torch.device("cpu")), hooks)
    if rank == 0:
        torch.save(dict(model.named_parameters()), folder / "ddp.pt")
    dist.destroy_process_group()


def test_a_split_too_small_for_a_batch_is_refused(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    config = config.model_copy(update={"global_batch_size": 1000})
    with pytest.raises(DataError, match="too small for one batch") as error:
        train(config, tokens, tmp_path, ALONE, HOOKS)
    assert "256 sequences of 16" in str(error.value) and "global_batch_size" in error.value.fix


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    optimizer = config.optimizer.model_copy(update={"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(DataError, match="the loss of step"):
        train(config.model_copy(update={"optimizer": optimizer}), tokens, tmp_path, ALONE, HOOKS)


@pytest.mark.parametrize(
    ("settings", "workers", "what"),
    [
        ({"microbatch_size": 3}, 1, "microbatch_size 3 does not divide"),
        ({}, 5, "which do not divide over 5 copies"),
        ({"layout": {"data": "fsdp"}}, 3, "which do not divide over 3 copies"),
        ({"layout": {"tensor": 2}}, 3, "not a multiple of tensor x pipeline x context = 2"),
        ({"layout": {"tensor": 4}}, 4, "num_heads 2 does not divide over 4 workers"),
        ({"layout": {"pipeline": 2}}, 2, "num_layers 1 does not divide over 2 workers"),
        ({"layout": {"context": 3}}, 3, "max_seq_len 16 does not divide over 3 workers"),
        ({"layout": {"data": "hsdp", "shard": 3}}, 4, "layout.shard 3 does not divide the 4 workers"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    config: TrainingConfig, settings: dict[str, object], workers: int, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as error:
        override(config, settings).check_layout(workers)
    assert "train." in error.value.fix


def test_ddp_takes_workers_that_the_microbatches_do_not_divide_over(config: TrainingConfig) -> None:
    config.check_layout(3)
