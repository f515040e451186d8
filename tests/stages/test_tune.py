"""The tune stage on Ray: every trial once, the best one's settings to paste, the same trials after a kill."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raymill.artifact import Artifact, Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.config import load, override
from raymill.errors import ConfigError, UsageError
from raymill.model.config import ModelConfig
from raymill.stages import train, tune
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress

CONFIG = tune.Config(
    space={
        "optimizer.learning_rate": tune.Range(log_uniform=(1e-4, 3e-2)),
        "model.num_layers": tune.Range(choice=(1, 2)),
    },
    num_trials=3,
    steps=8,
    first_rung_steps=4,
    train=train.Config(
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, hidden_dim=32, max_seq_len=16),
        global_batch_size=4,
        microbatch_size=4,
        validation_sequences=4,
    ),
)


def test_a_search_gives_every_trial_once_and_the_best_as_a_patch(
    cluster: Cluster, tokens: Artifact, inputs: Callable[..., Inputs], tmp_path: Path
) -> None:
    made = tune.run(CONFIG, inputs("tune", tokens), cluster)
    rows = pq.read_table(made.file("trials.parquet")).to_pylist()
    assert [row["trial"] for row in rows] == [0, 1, 2]
    drawn = tune.draw_trials(CONFIG)
    assert [{key: row[key] for key in CONFIG.space} for row in rows] == drawn
    best = made.figures["best_trial"]
    finished = [row for row in rows if row["steps"] == 8]
    assert rows[best] in finished and rows[best]["loss_nats"] == min(row["loss_nats"] for row in finished)
    patch = yaml.safe_load(made.file("best.yaml").read_text())["train"]
    assert patch["optimizer"]["learning_rate"] == drawn[best]["optimizer.learning_rate"]
    assert patch["model"]["num_layers"] == drawn[best]["model.num_layers"]
    shape = json.loads(made.file("best/config.json").read_text())
    assert shape["num_hidden_layers"] == drawn[best]["model.num_layers"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tune-00000000"]


def test_a_killed_driver_loses_no_trial_and_runs_none_twice(
    cluster: Cluster, tokens: Artifact, inputs: Callable[..., Inputs]
) -> None:
    config = CONFIG.model_copy(update={"steps": 400, "first_rung_steps": 100})
    given = inputs("tune", tokens)
    driver = multiprocessing.get_context("spawn").Process(target=_search, args=(config, tokens, given.draft.final))
    driver.start()
    deadline = time.monotonic() + 120
    while not list(given.draft.work.glob("trials/*/checkpoints/step-00000100")):
        assert time.monotonic() < deadline and driver.is_alive()
        time.sleep(0.01)
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    kept = sorted(given.draft.work.glob("trials/*/checkpoints/step-*"))
    assert kept and not given.draft.final.exists()
    made = tune.run(config, inputs("tune", tokens), cluster)
    assert made.figures["trials"] == 3 and made.figures["failed_trials"] == 0
    curves = [json.loads(line) for line in made.file("curves.jsonl").read_text().splitlines()]
    for trial in range(3):
        steps = [row["step"] for row in curves if row["trial"] == trial]
        # The search decides while a trial goes on: one that it ends may be a few steps past its rung.
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 100


def _search(config: tune.Config, tokens: Artifact, final: Path) -> None:
    given = Inputs({"tokens": tokens}, Draft(final), final.parent, Progress("tune"))
    with Cluster(ClusterConfig()) as own:
        tune.run(config, given, own)


def test_trials_depend_on_the_seed_alone() -> None:
    other = CONFIG.model_copy(update={"seed": 1})
    assert tune.draw_trials(CONFIG) == tune.draw_trials(CONFIG) != tune.draw_trials(other)
    for values in tune.draw_trials(CONFIG.model_copy(update={"num_trials": 50})):
        assert 1e-4 <= values["optimizer.learning_rate"] <= 3e-2 and values["model.num_layers"] in (1, 2)


@pytest.mark.parametrize(
    "space", ["{}", "{choice: [1], log_uniform: [1, 2]}", "{log_uniform: [0, 1]}", "{log_uniform: [2, 1]}"]
)
def test_a_range_without_sense_is_refused(space: str) -> None:
    with pytest.raises(ConfigError, match=r"space\.x"):
        load(tune.Config, None, [f"space={{x: {space}}}"])


def test_a_space_that_no_trial_can_take_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot choose a preset"):
        tune.check_space(override(CONFIG, {"space": {"preset": {"choice": ["tiny", "small"]}}}))
    with pytest.raises(UsageError, match=r"layout\.data is fsdp"):
        tune.check_space(override(CONFIG, {"train.layout.data": "fsdp"}))
