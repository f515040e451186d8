"""The loop learns, counts right, and a kill changes no bit."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raymill.config import override
from raymill.dataset.loader import IGNORE, Batch, Loader
from raymill.dataset.shards import TokenStream
from raymill.errors import DataError, UsageError
from raymill.model.files import WEIGHTS
from raymill.model.transformer import Transformer
from raymill.training.checkpoint import (
    CHECKPOINTS,
    EMA,
    OPTIMIZER,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    saved_state,
)
from raymill.training.config import TrainingConfig
from raymill.training.guard import EVENTS, read_events
from raymill.training.loop import Hooks, train
from raymill.training.metrics import METRICS, VALIDATION, StepMetrics, read_rows
from raymill.training.parallel.replicated import Replicated
from raymill.training.parallel.worker import Worker

VOCAB = 64
ALONE = Worker(0, 1, torch.device("cpu"))


def no_validation(model: Transformer, max_sequences: int | None) -> dict[str, float | None]:
    return {"loss_nats": 1.0, "bits_per_byte": None, "accuracy": 0.0}


HOOKS = Hooks(validate=no_validation)


def curve(folder: Path) -> list[tuple[int, float, float, float]]:
    rows = read_rows(folder / METRICS)
    return [(row["step"], row["loss"], row["gradient_norm"], row["learning_rate"]) for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(folder / CHECKPOINTS, pytest.fail)
    assert found is not None
    return load_checkpoint(found[0]).files[WEIGHTS]


def last_files(folder: Path) -> dict[str, bytes]:
    found = newest_checkpoint(folder / CHECKPOINTS, pytest.fail)
    assert found is not None
    return {path.name: path.read_bytes() for path in found[0].iterdir() if path.suffix == ".safetensors"}


def check_same(folder: Path, whole: Path) -> None:
    """Loss curve, validations, weights, optimizer state and running mean, to the bit."""
    assert curve(folder) == curve(whole)
    validations = [[{**row, "elapsed_s": 0} for row in read_rows(each / VALIDATION)] for each in (folder, whole)]
    assert validations[0] == validations[1] != []
    assert last_files(folder) == last_files(whole)


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
    told: list[int] = []

    def validate(model: Transformer, max_sequences: int | None) -> dict[str, float]:
        asked.append(max_sequences)
        return no_validation(model, max_sequences)

    hooks = Hooks(validate=validate, on_validation=lambda row: told.append(row.step))
    train(config, tokens, tmp_path, ALONE, hooks)
    assert asked == [4, None]
    assert told == [row["step"] for row in read_rows(tmp_path / VALIDATION)] == [6, 12]


def test_a_validation_sees_the_weights_of_its_step(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    """However late it runs, and though training goes on meanwhile."""
    seen: list[torch.Tensor] = []

    def validate(model: Transformer, max_sequences: int | None) -> dict[str, float]:
        time.sleep(0.3)
        seen.append(model.lm_head.weight.clone())
        return no_validation(model, max_sequences)

    config = config.model_copy(update={"validate_every_steps": 4})
    train(config, tokens, tmp_path, ALONE, Hooks(validate=validate))
    for weight, step in zip(seen[1:], (8, 12), strict=True):
        saved = load_checkpoint(checkpoint_path(tmp_path / CHECKPOINTS, step)).files[WEIGHTS]
        assert torch.equal(weight, saved["model.embed_tokens.weight"])


def test_every_step_is_told_once(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    steps: list[StepMetrics] = []
    train(config, tokens, tmp_path, ALONE, replace(HOOKS, on_step=steps.append))
    assert [metrics.step for metrics in steps] == list(range(1, 13))
    assert steps[-1].tokens == 12 * 8 * 16
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["step-00000008", "step-00000012"]


def test_accumulated_microbatches_equal_one_large_batch(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    train(config, tokens, tmp_path / "small", ALONE, HOOKS)
    train(config.model_copy(update={"microbatch_size": 8}), tokens, tmp_path / "large", ALONE, HOOKS)
    small, large = weights(tmp_path / "small"), weights(tmp_path / "large")
    for name, one in small.items():
        torch.testing.assert_close(one, large[name], rtol=2e-3, atol=2e-5)


FULL = {"optimizer.name": "muon", "ema_decay": 0.9, "model.dropout": 0.1, "precision": "fp32"}
"""What more a step can depend on: a kill and another number of workers must change no bit of it either."""


@pytest.mark.parametrize(("kill_at", "settings"), [(3, {}), (4, FULL), (9, {})])
def test_kill_and_resume_changes_no_bit(
    config: TrainingConfig, tokens: Path, tmp_path: Path, kill_at: int, settings: dict[str, Any]
) -> None:
    config = override(config, settings)
    train(config, tokens, tmp_path / "whole", ALONE, HOOKS)
    run_workers(1, config, tokens, tmp_path / "killed", kill_at)
    train(config, tokens, tmp_path / "killed", ALONE, HOOKS)
    check_same(tmp_path / "killed", tmp_path / "whole")


WIDE = {
    "model.model_dim": 256,
    "model.hidden_dim": 256,
    "model.max_seq_len": 64,
    "model.architecture": "qwen3",
    "steps": 8,
}
"""Wide enough for the products that only large matrices take."""


@pytest.mark.parametrize("settings", [{"packing": "concat"}, {"packing": "best_fit"}, WIDE])
def test_another_number_of_workers_on_the_way_changes_no_bit(
    config: TrainingConfig, documents: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = override(config, {**FULL, **settings})
    train(config, documents, tmp_path / "whole", ALONE, HOOKS)
    run_workers(1, config, documents, tmp_path / "killed", 5)
    run_workers(3, config, documents, tmp_path / "killed", 7)
    train(config, documents, tmp_path / "killed", ALONE, HOOKS)
    check_same(tmp_path / "killed", tmp_path / "whole")


def run_workers(count: int, config: TrainingConfig, tokens: Path, folder: Path, kill_at: int | None) -> None:
    """Trains with `count` gloo workers; rank 0 dies after step `kill_at`, and the others with it."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments = (count, config, tokens, folder, kill_at)
    workers = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(count)]
    for worker in workers:
        worker.start()
    workers[0].join(120)
    for worker in workers[1:]:
        if kill_at is not None:
            worker.kill()
        worker.join(120)
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert workers[0].exitcode == expected


def _work(rank: int, count: int, config: TrainingConfig, tokens: Path, folder: Path, kill_at: int | None) -> None:
    torch.set_num_threads(1)

    def die(metrics: StepMetrics) -> None:
        if metrics.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    train(config, tokens, folder, Worker.current(torch.device("cpu")), replace(HOOKS, on_step=die))
    if count > 1:
        dist.destroy_process_group()


def go_wrong_once(monkeypatch: pytest.MonkeyPatch, config: TrainingConfig, tokens: Path, at: int) -> None:
    """The loss of the batch that step `at` begins with is no number, whenever it is met."""
    whole = Replicated.backward
    loader = Loader(TokenStream(tokens, "train"), seq_len=16, global_batch_size=8, seed=config.seed)
    bad_BT = loader.batch(at, 0, 2).inputs_BT

    def backward(self: Replicated, batches: Iterator[Batch], learned: int, step: int) -> torch.Tensor:
        first, *rest = batches
        loss = whole(self, iter([first, *rest]), learned, step)
        return loss * math.nan if torch.equal(first.inputs_BT, bad_BT) else loss

    monkeypatch.setattr(Replicated, "backward", backward)


def test_a_step_that_is_skipped_leaves_the_weights_alone(
    config: TrainingConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"guard.on_nan": "skip", "checkpoint_every_steps": 1, "steps": 5})
    go_wrong_once(monkeypatch, config, tokens, 4)
    train(config, tokens, tmp_path, ALONE, HOOKS)
    before, after = (load_checkpoint(checkpoint_path(tmp_path / CHECKPOINTS, step)) for step in (4, 5))
    for name, tensors in before.files.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, after.files[name][key]), key
    assert [row.get("event") for row in read_rows(tmp_path / METRICS)] == [None] * 4 + ["nan_skipped"]


def test_a_step_that_is_rolled_back_never_sees_its_batch_again(
    config: TrainingConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"guard.on_nan": "roll_back"})
    go_wrong_once(monkeypatch, config, tokens, 5)
    train(config, tokens, tmp_path / "run", ALONE, HOOKS)
    (event,) = read_events(tmp_path / "run" / EVENTS)
    assert (event["step"], event["batch"], event["action"]) == (6, 5, "roll_back")
    assert {place["shard"] for place in event["sequences"]} <= {"train-00000.bin", "train-00001.bin"}
    # The same run without that batch from the start on.
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / EVENTS).write_text(json.dumps(event) + "\n")
    train(config, tokens, tmp_path / "without", ALONE, HOOKS)
    check_same(tmp_path / "run", tmp_path / "without")


def test_the_running_mean_knows_nothing_of_skipped_steps(
    config: TrainingConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"guard.on_nan": "skip", "ema_decay": 0.9, "steps": 2})
    go_wrong_once(monkeypatch, config, tokens, 0)
    train(config, tokens, tmp_path, ALONE, HOOKS)
    saved = load_checkpoint(checkpoint_path(tmp_path / CHECKPOINTS, 2))
    assert saved.state["updates"] == 1
    for name, mean in saved.files[EMA].items():
        torch.testing.assert_close(mean, saved.files[WEIGHTS][name])


def test_validations_on_a_course_that_is_rolled_back_are_told(
    config: TrainingConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"guard.on_nan": "roll_back", "validate_every_steps": 4})
    go_wrong_once(monkeypatch, config, tokens, 4)
    told: list[int] = []

    def validate(model: Transformer, max_sequences: int | None) -> dict[str, float | None]:
        time.sleep(0.3)
        return no_validation(model, max_sequences)

    train(config, tokens, tmp_path, ALONE, Hooks(validate=validate, on_validation=lambda row: told.append(row.step)))
    assert told == [4, 8, 12]


def test_a_validation_longer_than_the_watchdog_waits_is_no_hang(
    config: TrainingConfig, tokens: Path, tmp_path: Path
) -> None:
    config = override(config, {"guard.hang_timeout_s": 1.5, "validate_every_steps": 1, "steps": 3})

    def validate(model: Transformer, max_sequences: int | None) -> dict[str, float | None]:
        time.sleep(4.0)
        return no_validation(model, max_sequences)

    train(config, tokens, tmp_path, ALONE, Hooks(validate=validate))
    assert [row["step"] for row in read_rows(tmp_path / VALIDATION)] == [1, 2, 3]
    assert not (tmp_path / "stacks").exists()


def test_a_checkpoint_of_other_threads_is_told(config: TrainingConfig, tokens: Path, tmp_path: Path) -> None:
    config = config.model_copy(update={"checkpoint_every_steps": 1})
    run_workers(1, config, tokens, tmp_path, 5)
    torch.set_num_threads(2)
    told: list[str] = []
    train(config, tokens, tmp_path, ALONE, replace(HOOKS, warn=told.append))
    assert len(told) == 1 and "threads 1, now 2" in told[0]


def test_early_stopping_ends_with_a_whole_validation_and_a_checkpoint(
    config: TrainingConfig, tokens: Path, tmp_path: Path
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 9.0, 1.0])
    config = override(config, {"validate_every_steps": 2, "early_stopping": {"patience": 2}, "steps": 50})
    hooks = Hooks(validate=lambda model, count: {"loss_nats": next(losses), "bits_per_byte": None, "accuracy": 0.5})
    train(config, tokens, tmp_path, ALONE, hooks)
    # 2.5 and 2.6 are no better than 2.0: seen at the validation after them.
    assert [row["step"] for row in read_rows(tmp_path / VALIDATION)] == [2, 4, 6, 8, 10]
    found = newest_checkpoint(tmp_path / CHECKPOINTS, pytest.fail)
    assert found is not None and found[1] == 10 and saved_state(found[0])["ended"]
    train(config, tokens, tmp_path, ALONE, hooks)  # nothing is left to do
    assert len(read_rows(tmp_path / METRICS)) == 10


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    config: TrainingConfig, tokens: Path, tmp_path: Path
) -> None:
    train(config, tokens, tmp_path / "whole", ALONE, HOOKS)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    newest = checkpoint_path(tmp_path / "hurt" / CHECKPOINTS, 12) / OPTIMIZER
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    told: list[str] = []
    train(config, tokens, tmp_path / "hurt", ALONE, replace(HOOKS, warn=told.append))
    check_same(tmp_path / "hurt", tmp_path / "whole")
    assert len(told) == 1 and "step-00000012 is passed over" in told[0]


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
        (
            {"layout": {"tensor": 2, "pipeline": 2, "context": 2}, "model.num_layers": 2, "model.num_kv_heads": 2},
            16,
            "along 4 axes",
        ),
        (
            {"layout": {"data": "hsdp", "shard": 2, "tensor": 2, "context": 2}, "model.num_kv_heads": 2},
            16,
            "along 4 axes",
        ),
        ({"layout": {"data": "fsdp", "shard": 2}}, 4, "layout.shard is for hsdp"),
        ({"layout": {"data": "hsdp", "shard": 3}}, 4, "layout.shard 3 does not divide the 4 workers"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    config: TrainingConfig, settings: dict[str, object], workers: int, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as error:
        override(config, settings).check_layout(workers)
    assert "train." in error.value.fix


def test_a_layout_of_three_axes_is_taken(config: TrainingConfig) -> None:
    model = {"num_layers": 2}
    for layout in ({"data": "fsdp", "tensor": 2, "pipeline": 2}, {"data": "hsdp", "shard": 2, "tensor": 2}):
        override(config, {"layout": layout, "model": model, "microbatch_size": 1}).check_layout(8)


def test_ddp_takes_workers_that_the_microbatches_do_not_divide_over(config: TrainingConfig) -> None:
    config.check_layout(3)
