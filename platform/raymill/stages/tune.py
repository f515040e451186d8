"""Tune: token shards in, trials and the settings of the best one out.

A trial is a training run with some settings replaced (the one written exception to "stages never import stages"): it
runs the same `training.loop`, alone, in a Ray Tune worker. ASHA (Li et al. 2020) stops the worse trials at each rung.
The trials are drawn from the seed before any of them starts, so a killed and restored search has the same ones.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, model_validator

from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import RoleName
from raymill.cluster.interruptible import run_interruptible
from raymill.config import Config as Settings
from raymill.config import override
from raymill.errors import ConfigError, MachineError, Problem, UsageError
from raymill.stages.contract import Demand, Inputs
from raymill.stages.train import Config as TrainConfig
from raymill.stages.train import validator
from raymill.training.metrics import METRICS, VALIDATION, last_metrics, read_rows

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("tokens",)
MAY_TAKE: tuple[Kind, ...] = ("checkpoint",)
GIVES: Kind = "trials"
ROLE: RoleName = "train"
LIVE = False

METRIC = "loss_nats"


class Range(Settings):
    """The values one setting may take; exactly one of the two."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Any of these values."""
    log_uniform: tuple[float, float] | None = None
    """A number between these two positive bounds, uniform in its logarithm."""

    @model_validator(mode="after")
    def _one(self) -> Range:
        if (self.choice is None) == (self.log_uniform is None):
            raise ValueError("a range needs choice or log_uniform; fix: write one of them")
        if self.log_uniform is not None and not 0 < self.log_uniform[0] < self.log_uniform[1]:
            raise ValueError(f"log_uniform {list(self.log_uniform)} is not low, high; fix: write 0 < low < high")
        return self

    def draw(self, generator: Any) -> Any:
        if self.choice is not None:
            return self.choice[int(generator.integers(len(self.choice)))]
        assert self.log_uniform is not None
        low, high = (math.log(bound) for bound in self.log_uniform)
        return float(f"{math.exp(generator.uniform(low, high)):.4g}")


class Config(Settings):
    """A search over settings of `train`."""

    space: Annotated[dict[str, Range], Field(min_length=1)] = {
        "optimizer.learning_rate": Range(log_uniform=(5e-4, 1e-2)),
        "model.num_layers": Range(choice=(2, 4)),
    }
    """Dotted keys of `train` and the values they may take."""
    num_trials: Annotated[int, Field(ge=1, le=10000)] = 6
    """Trials drawn."""
    steps: Annotated[int, Field(ge=1)] = 60
    """Optimizer updates of a trial that reaches the end."""
    first_rung_steps: Annotated[int, Field(ge=1)] = 15
    """Steps after which a trial may first be stopped."""
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 2
    """One of this many trials survives a rung; rungs are this factor apart."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn trials."""
    train: TrainConfig | None = None
    """What trials start from; filled from the job's own train settings when left out."""

    @model_validator(mode="after")
    def _rungs(self) -> Config:
        if self.first_rung_steps > self.steps:
            raise ValueError(f"first_rung_steps {self.first_rung_steps} is above steps {self.steps}; fix: lower it")
        return self


def demand(config: Config) -> Demand:
    return Demand(1)


def source_state(config: Config) -> Any:
    return None


def draw_trials(config: Config) -> list[dict[str, Any]]:
    """The settings of every trial, from the seed alone."""
    import numpy as np

    generator = np.random.default_rng(config.seed)
    return [{key: space.draw(generator) for key, space in config.space.items()} for _ in range(config.num_trials)]


def trial_config(config: Config, values: dict[str, Any]) -> TrainConfig:
    """One trial's training settings; ConfigError names the key of the space that does not fit."""
    assert config.train is not None
    rungs: dict[str, Any] = {
        "steps": config.steps,
        "checkpoint_every_steps": config.first_rung_steps,
        "validate_every_steps": config.first_rung_steps,
    }
    warmup = {"schedule.warmup_steps": min(config.train.schedule.warmup_steps, config.first_rung_steps)}
    try:
        return override(config.train, {**rungs, **warmup, **values})
    except ConfigError as error:
        shown = ", ".join(f"{key}={value}" for key, value in values.items())
        problems = [Problem(f"tune.space ({shown})", each.what, each.fix) for each in error.problems]
        raise ConfigError(problems) from None


def check_space(config: Config) -> None:
    """ConfigError or UsageError when a drawn trial is not a training run, before anything has run."""
    for values in draw_trials(config):
        if "preset" in values:
            why = "a preset fills in only what the job leaves out, and a trial's settings are all there"
            raise UsageError("tune.space cannot choose a preset", why=why, fix="name the settings that it stands for")
        trial = trial_config(config, values)
        trial.check_layout(1, "tune.train")
        if trial.layout.data != "ddp":
            why = "a trial is one process"
            raise UsageError(
                f"tune.train.layout.data is {trial.layout.data}", why=why, fix="set tune.train.layout.data to ddp"
            )


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Runs the search, or takes up the one a kill cut short, and publishes its trials."""
    from raymill.evaluation.perplexity import describe_loss
    from raymill.training.checks import check_start, check_tokens

    tokens, work = inputs["tokens"], inputs.draft.work
    trials = draw_trials(config)
    start = inputs.artifacts.get("checkpoint")
    for values in trials:
        check_tokens(trial_config(config, values), tokens.path)
        if start is not None:
            check_start(trial_config(config, values), start, tokens)
    cluster.connect()
    errors = _search(config, trials, tokens.path, start.path if start else None, inputs, cluster)
    rows = [_trial_row(number, values, work) for number, values in enumerate(trials)]
    finished = [row for row in rows if row[METRIC] is not None]
    if not finished:
        why = "; ".join(sorted(set(errors)))[:300] or None
        raise MachineError("every trial failed", why=why, fix="narrow tune.space, then run again")
    best = min(finished, key=lambda row: (-row["steps"], row[METRIC]))
    _write_results(inputs.draft.path, work, rows, best["trial"], trials[best["trial"]])
    figures = {
        "trials": len(rows),
        "failed_trials": len(errors),
        "best_trial": best["trial"],
        "best_loss_nats": best[METRIC],
        "best_bits_per_byte": best["bits_per_byte"],
        "best_settings": trials[best["trial"]],
    }
    shown = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in trials[best["trial"]].items()
    )
    reached = describe_loss(best[METRIC], best["bits_per_byte"])
    full = sum(row["steps"] >= config.steps for row in rows)
    summary = f"best of {len(rows)} trials ({full} ran to the end): {shown}: {reached} after {best['steps']} steps"
    return inputs.publish("tune", GIVES, config, summary, figures)


def _search(
    config: Config, trials: list[dict[str, Any]], tokens: Path, start: Path | None, inputs: Inputs, cluster: Cluster
) -> list[str]:
    """Runs every trial that is not finished; returns the last line of each failed trial's error."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    role, work = cluster.config.roles.train, inputs.draft.work.absolute()
    settings = {
        "config": config.model_dump(mode="json"),
        "tokens": str(tokens.absolute()),
        "start": str(start.absolute()) if start else None,
        "work": str(work),
        "threads": role.threads,
        "gpu": role.gpus_per_worker > 0,
        "trials": trials,
    }
    resources = {"cpu": role.cpus_per_worker, "gpu": role.gpus_per_worker}
    trainable = tune.with_resources(tune.with_parameters(_trial, settings=settings), resources)
    experiment = str(work / "ray")
    if tune.Tuner.can_restore(experiment):
        tuner = tune.Tuner.restore(experiment, trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="min",
                scheduler=ASHAScheduler(
                    time_attr="steps",
                    max_t=config.steps,
                    grace_period=config.first_rung_steps,
                    reduction_factor=config.reduction_factor,
                ),
            ),
            run_config=tune.RunConfig(name="ray", storage_path=str(work), verbose=0),
        )
    results = run_interruptible(tuner.fit, lambda: _show_progress(config, inputs))
    return [str(error).strip().splitlines()[-1] for error in results.errors]


def _show_progress(config: Config, inputs: Inputs) -> None:
    """Adds up what the trials have written to their metrics files."""
    folders = [_trial_folder(inputs.draft.work, number) for number in range(config.num_trials)]
    rows = [row for row in (last_metrics(folder / METRICS) for folder in folders) if row is not None]
    if not rows:
        inputs.progress.waiting("trials start")
    else:
        done = sum(row["step"] >= config.steps for row in rows)
        tokens = sum(row["tokens"] for row in rows)
        note = f"{len(rows)} of {config.num_trials} trials begun, {done} at the end"
        inputs.progress.update(tokens, None, "tokens", note)
        inputs.draft.checkpoint_clock()


def _trial(params: dict[str, Any], settings: dict[str, Any]) -> None:
    """Runs in a Ray Tune worker: one training run that reports at each rung, again from its checkpoint after a kill."""
    import torch
    from ray import tune

    from raymill.training.loop import Hooks
    from raymill.training.loop import train as train_model
    from raymill.training.parallel.worker import Worker

    torch.set_num_threads(settings["threads"])
    config = Config.model_validate(settings["config"])
    number = params["trial"]
    training = trial_config(config, settings["trials"][number])
    tokens, folder = Path(settings["tokens"]), _trial_folder(Path(settings["work"]), number)
    worker = Worker.current(torch.device("cuda" if settings["gpu"] else "cpu"))
    score = validator(training, tokens, worker.device)

    def report(steps: int, figure: float) -> None:
        tune.report({"steps": steps, METRIC: figure})

    # A kill can lose reports the search had not yet recorded; it ignores those it had. A rung must not go missing.
    for row in read_rows(folder / VALIDATION):
        report(row["step"], row[METRIC])
    # Every rung is scored on the same sequences, the last one too: trials are compared with each other.
    hooks = Hooks(
        validate=lambda model, _: score(model, training.validation_sequences),
        on_validation=lambda row: report(row.step, getattr(row, METRIC)),
    )
    train_model(training, tokens, folder, worker, hooks, Path(settings["start"]) if settings["start"] else None)


def _trial_folder(work: Path, number: int) -> Path:
    return work / "trials" / f"trial-{number:04d}"


def _trial_row(number: int, values: dict[str, Any], work: Path) -> dict[str, Any]:
    """What a trial reached, from its own files."""
    rows = read_rows(_trial_folder(work, number) / VALIDATION)
    last = rows[-1] if rows else None
    return {
        "trial": number,
        **values,
        "steps": last["step"] if last else 0,
        **{name: last[name] if last else None for name in (METRIC, "bits_per_byte")},
        "elapsed_s": last["elapsed_s"] if last else None,
    }


def _write_results(folder: Path, work: Path, rows: list[dict[str, Any]], best: int, values: dict[str, Any]) -> None:
    """trials.parquet, curves.jsonl, best.yaml (to paste into a job) and best/ (its newest checkpoint)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raymill.training.checkpoint import CHECKPOINTS, newest_checkpoint

    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    curves = [
        {"trial": row["trial"], **step}
        for row in rows
        for step in read_rows(_trial_folder(work, row["trial"]) / METRICS)
    ]
    write_atomic(folder / "curves.jsonl", "".join(json.dumps(step) + "\n" for step in curves))
    patch: dict[str, Any] = {}
    for key, value in values.items():
        node = patch
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    write_atomic(folder / "best.yaml", yaml.safe_dump({"train": patch}))
    found = newest_checkpoint(_trial_folder(work, best) / CHECKPOINTS, lambda text: None)
    if found is not None:
        shutil.copytree(found[0], folder / "best", dirs_exist_ok=True)
