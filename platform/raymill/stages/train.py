"""Train: token shards in, checkpoint out.

Ray Train places the workers and starts them again when one dies; each runs `training.loop` and reads the token shards
itself. What counts as saved is our own checkpoint folder in the draft, not Ray's: a killed job, worker or driver goes on
from there.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import Role, RoleName
from raymill.cluster.interruptible import run_interruptible
from raymill.errors import MachineError, RaymillError, error_from_json, error_to_json, refused_write
from raymill.model.files import CONFIG, TOKENIZER, WEIGHTS
from raymill.stages.contract import Demand, Inputs
from raymill.training.config import LayoutConfig, TrainingConfig
from raymill.training.guard import EVENTS
from raymill.training.memory import PROCESS_BYTES, MemoryPrediction, advise, describe, predict
from raymill.training.metrics import METRICS, VALIDATION, last_metrics
from raymill.training.notes import NOTES, Notes
from raymill.training.report import live_line, write_report
from raymill.training.tensorboard import TENSORBOARD
from raymill.training.watchdog import STACKS

if TYPE_CHECKING:
    import torch

    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("tokens",)
MAY_TAKE: tuple[Kind, ...] = ("checkpoint",)
GIVES: Kind = "checkpoint"
ROLE: RoleName = "train"
LIVE = False

_ERROR = "error.json"
_ROOM = "room"
"""Kept so that an error can be written down where the disk is full."""
_RAY_BYTES = 132_000_000
"""What Ray Train adds to a worker's process."""


class Config(TrainingConfig):
    """A training run and how its workers are placed."""

    num_workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Workers: copies of the model x tensor x pipeline x context."""
    min_workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Go on with as few as this when there is no room for num_workers; layout ddp only, whose bits do not depend on it.
    None means num_workers or none."""
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    """Times the workers are started again after one dies, before the stage gives up."""

    @model_validator(mode="after")
    def _elastic(self) -> Config:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}; fix: lower it")
        if self.min_workers is not None and (self.layout.data != "ddp" or self.layout.model_size > 1):
            raise ValueError("min_workers is for the layout ddp alone; fix: leave it out, or leave layout out")
        return self


def demand(config: Config) -> Demand:
    return Demand(config.min_workers or config.num_workers)


def source_state(config: Config) -> Any:
    return None


def memory_notes(config: Config, vocab_size: int, role: Role) -> list[str]:
    """What a worker will need at its peak and, where the role gives it less, what to change."""
    prediction = _predict(config, vocab_size, role)
    notes = [describe(prediction)]
    limit_bytes = int(role.memory_gib_per_worker * 2**30)
    # What a GPU has stands in no cluster file.
    change = None if role.gpus_per_worker else advise(prediction, limit_bytes, config)
    if change is not None:
        notes.append(
            f"that is more than cluster.roles.train.memory_gib_per_worker = {role.memory_gib_per_worker:g}: raise it "
            f"where there is memory, or {change}"
        )
    return notes


def _predict(config: Config, vocab_size: int, role: Role) -> MemoryPrediction:
    if role.gpus_per_worker:
        return predict(config, vocab_size, config.num_workers, "cuda")
    return predict(config, vocab_size, config.num_workers, "cpu", PROCESS_BYTES["cpu"] + _RAY_BYTES)


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Trains to the last step and publishes the last checkpoint with its curves."""
    from raymill.training.checkpoint import CHECKPOINTS, newest_checkpoint, saved_state

    tokens, work = inputs["tokens"], inputs.draft.work
    start = inputs.artifacts.get("checkpoint")
    check(config, tokens, start, work)
    for note in memory_notes(config, tokens.figures["vocab_size"], cluster.config.roles.train)[1:]:
        inputs.progress.note(note)
    found = newest_checkpoint(work / CHECKPOINTS, lambda _: None)  # a damaged one is met again by a worker, who says so
    if found is None or not saved_state(found[0])["ended"]:
        _train(config, tokens.path, start.path if start else None, inputs, cluster)
        found = newest_checkpoint(work / CHECKPOINTS, inputs.progress.note)
        assert found is not None
    _fill_draft(found[0], inputs)
    figures = _figures(config, work, tokens, cluster)
    try:
        write_report(inputs.draft.path, f"train {inputs.run_folder.name}", config.model_dump(mode="json"), figures)
    except subprocess.CalledProcessError as error:
        inputs.progress.note(f"report.html could not be drawn ({error}); everything else is there")
    return inputs.publish("train", GIVES, config, _summary(config, figures, tokens), figures)


def check(config: Config, tokens: Artifact, start: Artifact | None, work: Path) -> None:
    """Everything that can be found wrong before a worker starts: UsageError, DataError or MachineError."""
    import torch

    from raymill.training.checkpoint import CHECKPOINTS, check_writable
    from raymill.training.checks import check_start, check_tokens
    from raymill.training.parallel.choice import check_placement
    from raymill.training.parallel.worker import Worker

    check_placement(config, Worker(0, config.num_workers, torch.device("cpu")))
    check_tokens(config, tokens.path)
    if start is not None:
        check_start(config, start, tokens)
    whole = config.model_copy(update={"layout": LayoutConfig()})
    room = predict(whole, tokens.figures["vocab_size"], 1, "cpu").snapshot_bytes
    check_writable(work / CHECKPOINTS, room)


def _fill_draft(last: Path, inputs: Inputs) -> None:
    """The files of the artifact: the model that was validated last, how it came about, its tokenizer."""
    from raymill.model.files import read_model_config
    from raymill.model.weights import read_tensors, write_weights
    from raymill.training.checkpoint import EMA, OPTIMIZER

    work, folder = inputs.draft.work, inputs.draft.path
    curves = [work / name for name in (METRICS, VALIDATION, EVENTS) if (work / name).exists()]
    for path in (last / WEIGHTS, last / CONFIG, last / OPTIMIZER, *curves, inputs["tokens"].file(TOKENIZER)):
        shutil.copyfile(path, folder / path.name)
    if (last / EMA).exists():
        write_weights(folder, read_model_config(last)[0], read_tensors(last / EMA))
    for name in (TENSORBOARD, STACKS):
        if (work / name).exists():
            shutil.copytree(work / name, folder / name, dirs_exist_ok=True)


def _train(config: Config, tokens: Path, start: Path | None, inputs: Inputs, cluster: Cluster) -> None:
    """Runs the workers to the last step; raises what a worker raised."""
    work = inputs.draft.work
    (work / _ERROR).unlink(missing_ok=True)
    (work / NOTES).unlink(missing_ok=True)
    write_atomic(work / _ROOM, bytes(8192))
    role = cluster.config.roles.train
    settings = {
        "config": config.model_dump(mode="json"),
        "tokens": str(tokens.absolute()),
        "work": str(work.absolute()),
        "threads": role.threads,
        "gpu": role.gpus_per_worker > 0,
        "start": str(start.absolute()) if start else None,
    }
    place_workers(config, settings, inputs, cluster)
    if (work / _ERROR).exists():
        raise error_from_json((work / _ERROR).read_text(encoding="utf-8"))


def place_workers(config: Config, settings: dict[str, Any], inputs: Inputs, cluster: Cluster) -> None:
    """Has Ray Train run `work_as_worker(settings)` in every worker until all return, and show how far they are."""
    work = inputs.draft.work
    shutil.rmtree(_ray_folder(work), ignore_errors=True)  # of an attempt that was killed; its state is not ours
    cluster.connect()
    trainer = _trainer(config, settings, work, cluster)
    shown = _Shown(config, inputs)
    try:
        run_interruptible(trainer.fit, shown.update)
    except Exception as error:
        if not (work / _ERROR).exists():
            why = " ".join(str(error.__cause__ or error).split())[-300:]
            fix = "run the same command again: it continues from the last checkpoint"
            raise MachineError("the training workers failed", why=why, fix=fix) from error
    shown.update()


def _figures(config: Config, work: Path, tokens: Artifact, cluster: Cluster) -> dict[str, Any]:
    import torch

    from raymill.training.parallel.choice import tolerance_of

    device = "cuda" if cluster.config.roles.train.gpus_per_worker else "cpu"
    row, validation = last_metrics(work / METRICS), last_metrics(work / VALIDATION)
    assert row is not None and validation is not None
    return {
        "steps": row["step"],
        "validation_bits_per_byte": validation["bits_per_byte"],
        "validation_loss_nats": validation["loss_nats"],
        "parameters": config.model.num_parameters(tokens.figures["vocab_size"]),
        "train_tokens": row["tokens"],
        "tokens_per_s": row["tokens"] / row["elapsed_s"],
        # What the bits of this run depend on, beside its settings.
        "threads_per_worker": cluster.config.roles.train.threads,
        "torch": torch.__version__,
        "device": device,
        # How far the loss may be from that of one worker, nats; 0 where every bit is equal.
        "layout_tolerance_nats": tolerance_of(config, torch.device(device)),
    }


def _summary(config: Config, figures: dict[str, Any], tokens: Artifact) -> str:
    from raymill.evaluation.perplexity import describe_loss

    reached = describe_loss(figures["validation_loss_nats"], figures["validation_bits_per_byte"])
    to_beat = ""
    if figures["validation_bits_per_byte"] is not None:
        unigram, zstd = (tokens.figures[f"{name}_bits_per_byte"] for name in ("unigram", "zstd19"))
        to_beat = f" (unigram {unigram:.3f}, zstd -19 {zstd:.3f})"
    early = f", stopped early after {figures['steps']} steps" if figures["steps"] < config.steps else ""
    return (
        f"validation {reached}{to_beat}{early}; "
        f"{figures['parameters'] / 1e6:.1f} M parameters, {figures['train_tokens'] / 1e6:.2f} M tokens at "
        f"{figures['tokens_per_s']:,.0f} tokens/s on {_worker_words(config)}"
    )


def _worker_words(config: Config) -> str:
    if config.min_workers is not None and config.min_workers < config.num_workers:
        return f"{config.min_workers} to {config.num_workers} workers"
    return f"{config.num_workers} worker{'s' if config.num_workers > 1 else ''}"


def _ray_folder(work: Path) -> Path:
    """Where Ray Train keeps its own state while it runs."""
    return work.absolute() / "ray"


def _trainer(config: Config, settings: dict[str, Any], work: Path, cluster: Cluster) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    role = cluster.config.roles.train
    resources = {"CPU": role.cpus_per_worker}
    if role.gpus_per_worker:
        resources["GPU"] = role.gpus_per_worker
    elastic = config.min_workers is not None and config.min_workers < config.num_workers
    return TorchTrainer(
        work_as_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.num_workers) if elastic else config.num_workers,
            use_gpu=role.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if role.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name="train",
            storage_path=str(_ray_folder(work)),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def work_as_worker(settings: dict[str, Any]) -> None:
    """Runs in each worker.

    Ray starts the group again whatever the reason, so a user's error is written down by the worker that meets it; the
    group that comes next sees it and ends.
    """
    import torch

    from raymill.training.loop import Hooks, train
    from raymill.training.parallel.worker import Worker

    work = Path(settings["work"])
    if (work / _ERROR).exists():
        return
    torch.set_num_threads(settings["threads"])
    config = Config.model_validate(settings["config"])
    tokens = Path(settings["tokens"])
    worker = Worker.current(torch.device("cuda" if settings["gpu"] else "cpu"))
    start = Path(settings["start"]) if settings["start"] else None
    hooks = Hooks(validate=validator(config, tokens, worker.device), warn=Notes(work).add)
    try:
        train(config, tokens, work, worker, hooks, start)
    except (RaymillError, OSError) as error:
        told = error if isinstance(error, RaymillError) else refused_write("train", error, work)
        if told is not None:
            (work / _ROOM).unlink(missing_ok=True)
            write_atomic(work / _ERROR, error_to_json(told))
        raise


def validator(config: TrainingConfig, tokens: Path, device: torch.device) -> Any:
    """A function that scores a model on the val split, as `training.loop.Hooks` wants it."""
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.perplexity import evaluate_stream

    stream = TokenStream(tokens, "val")

    def validate(model: Any, max_sequences: int | None) -> dict[str, float | None]:
        scores = evaluate_stream(
            model,
            stream,
            seq_len=config.model.max_seq_len,
            max_sequences=max_sequences,
            batch_size=config.microbatch_size,
            device=device,
        )
        return {"loss_nats": scores.loss_nats, "bits_per_byte": scores.bits_per_byte, "accuracy": scores.accuracy}

    return validate


class _Shown:
    """The live line of a run, made of what rank 0 has written to its files."""

    def __init__(self, config: Config, inputs: Inputs) -> None:
        self._config, self._inputs = config, inputs
        self._notes = Notes(inputs.draft.work)

    def update(self) -> None:
        config, inputs, work = self._config, self._inputs, self._inputs.draft.work
        for note in self._notes.take_new():
            inputs.progress.note(note)
        row = last_metrics(work / METRICS)
        if row is None:
            inputs.progress.waiting("workers start")
        else:
            total = config.steps * config.global_batch_size * config.model.max_seq_len
            note = live_line(row, config.steps, last_metrics(work / VALIDATION))
            inputs.progress.update(row["tokens"], total, "tokens", note)
            inputs.draft.checkpoint_clock()
