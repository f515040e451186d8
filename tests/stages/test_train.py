"""The train stage on Ray: two workers, one of them killed, the same bits."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymill.artifact import Artifact, open_artifact
from raymill.cluster.config import ClusterConfig, Role
from raymill.cluster.session import Cluster
from raymill.config import Config, override
from raymill.errors import DataError, MachineError, UsageError
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.stages import train
from raymill.stages.contract import Inputs
from raymill.training.checks import check_tokens
from raymill.training.loop import Hooks
from raymill.training.loop import train as train_model
from raymill.training.parallel.worker import Worker

CONFIG = train.Config(
    model=ModelConfig(num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1, hidden_dim=48, max_seq_len=32),
    steps=60,
    global_batch_size=8,
    microbatch_size=4,
    checkpoint_every_steps=10,
    validate_every_steps=30,
    validation_sequences=8,
)


def losses(artifact: Artifact) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def kill_a_worker_after(metrics: Path, step: int, killed: list[int]) -> threading.Thread:
    """Kills one training worker once the run has passed `step`, and notes its pid."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") > step:
                for process in Path("/proc").iterdir():
                    if process.name.isdigit() and b"RayTrainWorker" in _command(process):
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_worker_changes_no_bit(
    cluster: Cluster, tokens: Artifact, inputs: Callable[..., Inputs], tmp_path: Path
) -> None:
    whole = train.run(CONFIG, inputs("train", tokens), cluster)
    assert whole.manifest.kind == "checkpoint" and whole.manifest.inputs == {"tokens": tokens.name}
    assert whole.figures["validation_bits_per_byte"] < 6.0
    assert {entry.path for entry in whole.manifest.files} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "optimizer.safetensors",
        "report.html",
        "tokenizer.json",
        "validation.jsonl",
    }
    given = inputs("train-killed", tokens)
    victims: list[int] = []
    killer = kill_a_worker_after(given.draft.work / "metrics.jsonl", 25, victims)
    killed = train.run(CONFIG, given, cluster)
    killer.join()
    assert len(victims) == 1
    assert losses(killed) == losses(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert killed.file(name).read_bytes() == whole.file(name).read_bytes()
    assert open_artifact(killed.path, "checkpoint").figures["train_tokens"] == 60 * 8 * 32
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train-00000000", "train-killed-00000000"}


def test_a_kill_at_the_last_moment_costs_no_training(
    tokens: Artifact, inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits in one process: the finished checkpoint is there, the publishing was cut short."""
    config = CONFIG.model_copy(update={"num_workers": 1, "steps": 4})
    given = inputs("train", tokens)
    device = torch.device("cpu")
    hooks = Hooks(validate=train.validator(config, tokens.path, device))
    train_model(config, tokens.path, given.draft.work, Worker(0, 1, device), hooks)
    place = Cluster(ClusterConfig())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raymill.artifact.sync_folder", interrupt)
        train.run(config, given, place)
    made = train.run(config, inputs("train", tokens), place)
    assert made.figures["train_tokens"] == 4 * 8 * 32 and not place.connected


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_start_from_another_shape_or_tokenizer_is_refused(tokens: Artifact, inputs: Callable[..., Inputs]) -> None:
    def checkpoint(name: str, layers: int, tokenizer: bytes) -> Artifact:
        draft = inputs(name).draft
        model = Transformer(CONFIG.model.model_copy(update={"num_layers": layers}), tokens.figures["vocab_size"])
        save_model(draft.path, model, end_id=0)
        (draft.path / "tokenizer.json").write_bytes(tokenizer)
        return draft.publish("checkpoint", "train", config=Config(), inputs={}, summary="", figures={})

    ours = tokens.file("tokenizer.json").read_bytes()
    with pytest.raises(UsageError, match=r"is not that of train\.model"):
        train.run(CONFIG, inputs("train", tokens, checkpoint("a", 2, ours)), None)
    with pytest.raises(UsageError, match="trained with another tokenizer"):
        train.run(CONFIG, inputs("train", tokens, checkpoint("b", 1, ours + b" ")), None)


@pytest.mark.parametrize("max_failures", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_worker_says_reaches_the_user(
    cluster: Cluster,
    tokens: Artifact,
    inputs: Callable[..., Inputs],
    monkeypatch: pytest.MonkeyPatch,
    max_failures: int,
) -> None:
    given = inputs("train", tokens)
    monkeypatch.setattr(train, "check", lambda *_: (given.draft.work / "checkpoints").write_text("in the way"))
    config = CONFIG.model_copy(update={"max_failures": max_failures})
    with pytest.raises(MachineError, match="no checkpoint can be written") as error:
        train.run(config, given, cluster)
    assert error.value.fix.startswith("free space there")
    assert not given.draft.final.exists()


def test_too_few_tokens_are_said_before_any_worker_starts(tokens: Artifact, inputs: Callable[..., Inputs]) -> None:
    config = CONFIG.model_copy(update={"global_batch_size": 2048})
    with pytest.raises(DataError, match="too small for one batch"):
        train.run(config, inputs("train", tokens), None)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_workers": 5}, "do not divide over 5 copies"),
        ({"layout": {"tensor": 2}, "model.num_kv_heads": 1}, "num_kv_heads 1 does not divide over 2 workers"),
        ({"layout": {"pipeline": 2}}, "num_layers 1 does not divide over 2 workers"),
        ({"layout": {"context": 2}, "num_workers": 3}, "not a multiple of tensor x pipeline x context = 2"),
        ({"precision": "fp8"}, "fp8 needs a GPU"),
    ],
)
def test_a_layout_that_does_not_fit_is_said_before_any_worker_starts(
    tokens: Artifact, inputs: Callable[..., Inputs], settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=what) as error:
        train.run(override(CONFIG, settings), inputs("train", tokens), None)
    assert "train." in error.value.fix


def test_a_storage_that_takes_nothing_is_said_before_any_worker_starts(
    tokens: Artifact, inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs("train", tokens)
    (given.draft.work / "checkpoints").write_text("in the way")
    with pytest.raises(MachineError, match="no checkpoint can be written") as error:
        train.run(CONFIG, given, None)
    assert "storage" in error.value.fix


def test_an_id_outside_the_vocabulary_is_said_before_any_worker_starts(
    tokens: Artifact, inputs: Callable[..., Inputs], tmp_path: Path
) -> None:
    shutil.copytree(tokens.path, tmp_path / "hurt")
    ids = np.memmap(tmp_path / "hurt" / "train-00000.bin", "<u2", "r+")
    ids[1000] = tokens.figures["vocab_size"]
    ids.flush()
    with pytest.raises(DataError, match=f"holds the id {tokens.figures['vocab_size']}") as error:
        check_tokens(CONFIG, tmp_path / "hurt")
    assert "token 1000" in str(error.value)


def test_a_val_split_shorter_than_a_sequence_is_said(tokens: Artifact, inputs: Callable[..., Inputs]) -> None:
    config = override(CONFIG, {"model.max_seq_len": 1 << 14, "global_batch_size": 1, "microbatch_size": 1})
    with pytest.raises(DataError, match="the val split is too small for one batch"):
        check_tokens(config, tokens.path)


def test_memory_that_a_worker_does_not_have_is_told_with_what_to_change() -> None:
    config = override(
        CONFIG, {"model.max_seq_len": 1024, "model.model_dim": 512, "model.num_layers": 8, "num_workers": 1}
    )
    (enough,) = train.memory_notes(config, 8192, Role(memory_gib_per_worker=64))
    assert enough.startswith("about ") and "activations" in enough
    _, change = train.memory_notes(config, 8192, Role(memory_gib_per_worker=1.2))
    assert "memory_gib_per_worker = 1.2" in change and "train.microbatch_size" in change
