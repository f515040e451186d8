"""Train: token shards in, checkpoint out.

Ray Train places the workers and starts them again when one dies; each runs `training.loop` and reads the token shards
itself. What counts as saved is our own checkpoint folder in the draft, not Ray's: a killed job, worker or driver goes on
from there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import RoleName
from raymill.cluster.interruptible import run_interruptible
from raymill.errors import MachineError, RaymillError, UsageError, error_from_json, error_to_json
from raymill.model.files import CONFIG, TOKENIZER, WEIGHTS
from raymill.stages.contract import Demand, Inputs
from raymill.training.config import TrainingConfig
from raymill.training.metrics import METRICS, last_metrics

if TYPE_CHECKING:
    import torch

    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("tokens",)
MAY_TAKE: tuple[Kind, ...] = ("checkpoint",)
GIVES: Kind = "checkpoint"
ROLE: RoleName = "train"
LIVE = False

_ERROR = "error.json"


class Config(TrainingConfig):
    """A training run and how its workers are placed."""

    num_workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Data-parallel workers."""
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    """Times the workers are started again after one dies, before the stage gives up."""


def demand(config: Config) -> Demand:
    return Demand(config.num_workers)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Trains until `steps` are done and publishes the last checkpoint with its metrics."""
    from raymill.evaluation.perplexity import describe_loss
    from raymill.training.checkpoint import CHECKPOINTS, OPTIMIZER, checkpoint_path, newest_checkpoint

    tokens, work, folder = inputs["tokens"], inputs.draft.work, inputs.draft.path
    config.check_layout(config.num_workers)
    check_tokens(config, tokens.path)
    start = inputs.artifacts.get("checkpoint")
    if start is not None:
        _check_start(config, start, tokens)
    found = newest_checkpoint(work / CHECKPOINTS, inputs.progress.note)
    if found is None or found[1] < config.steps:
        _train(config, tokens.path, start.path if start else None, inputs, cluster)
    last = checkpoint_path(work / CHECKPOINTS, config.steps)
    for path in (last / WEIGHTS, last / CONFIG, last / OPTIMIZER, work / METRICS, tokens.file(TOKENIZER)):
        shutil.copyfile(path, folder / path.name)
    figures = _figures(config, work, tokens, cluster.config.roles.train.threads)
    validation = describe_loss(figures["validation_loss_nats"], figures["validation_bits_per_byte"])
    to_beat = ""
    if figures["validation_bits_per_byte"] is not None:
        unigram, zstd = (tokens.figures[f"{name}_bits_per_byte"] for name in ("unigram", "zstd19"))
        to_beat = f" (unigram {unigram:.3f}, zstd -19 {zstd:.3f})"
    summary = (
        f"validation {validation}{to_beat}; "
        f"{figures['parameters'] / 1e6:.1f} M parameters, {figures['train_tokens'] / 1e6:.2f} M tokens at "
        f"{figures['tokens_per_s']:,.0f} tokens/s on {config.num_workers} workers"
    )
    return inputs.publish("train", GIVES, config, summary, figures)


def _train(config: Config, tokens: Path, start: Path | None, inputs: Inputs, cluster: Cluster) -> None:
    """Runs the workers to the last step; raises what a worker raised."""
    work = inputs.draft.work
    (work / _ERROR).unlink(missing_ok=True)
    shutil.rmtree(_ray_folder(work), ignore_errors=True)  # of an attempt that was killed; its state is not ours
    cluster.connect()
    trainer = _trainer(config, tokens, start, work, cluster)
    try:
        run_interruptible(trainer.fit, lambda: _show_progress(config, work / METRICS, inputs))
    except Exception as error:
        if not (work / _ERROR).exists():
            why = " ".join(str(error.__cause__ or error).split())[-300:]
            fix = "run the same command again: it continues from the last checkpoint"
            raise MachineError("the training workers failed", why=why, fix=fix) from error
    if (work / _ERROR).exists():
        raise error_from_json((work / _ERROR).read_text(encoding="utf-8"))


def _figures(config: Config, work: Path, tokens: Artifact, threads: int) -> dict[str, Any]:
    import torch

    row = last_metrics(work / METRICS)
    assert row is not None
    return {
        "validation_bits_per_byte": row["validation"]["bits_per_byte"],
        "validation_loss_nats": row["validation"]["loss_nats"],
        "parameters": config.model.num_parameters(tokens.figures["vocab_size"]),
        "train_tokens": row["tokens"],
        "tokens_per_s": row["tokens"] / row["elapsed_s"],
        # What the bits of this run depend on, beside its settings.
        "threads_per_worker": threads,
        "torch": torch.__version__,
    }


def _check_start(config: TrainingConfig, start: Artifact, tokens: Artifact) -> None:
    """UsageError unless the checkpoint to start from has this job's shape and tokenizer."""
    from raymill.model.config import ModelConfig
    from raymill.model.files import read_config

    fix = "set train.model as in its config.json, and start from tokens made with its tokenizer"
    values = read_config(start.path)
    if "quantization" in values or ModelConfig.from_hugging_face(values) != config.model:
        raise UsageError(f"the model in {start.path} is not of the shape of train.model", where="start_from", fix=fix)
    if start.file(TOKENIZER).read_bytes() != tokens.file(TOKENIZER).read_bytes():
        raise UsageError(f"the model in {start.path} was trained with another tokenizer", where="start_from", fix=fix)


def check_tokens(config: TrainingConfig, tokens: Path) -> None:
    """DataError, before any worker starts, when the splits cannot make a batch or a validation."""
    from raymill.dataset.loader import Loader
    from raymill.dataset.shards import TokenStream

    length = config.model.max_seq_len
    Loader(
        TokenStream(tokens, "train"),
        seq_len=length,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        packing=config.packing,
    )
    Loader(TokenStream(tokens, "val"), seq_len=length, global_batch_size=1, seed=config.seed)


def _ray_folder(work: Path) -> Path:
    """Where Ray Train keeps its own state while it runs."""
    return work.absolute() / "ray"


def _trainer(config: Config, tokens: Path, start: Path | None, work: Path, cluster: Cluster) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    role = cluster.config.roles.train
    resources = {"CPU": role.cpus_per_worker}
    if role.gpus_per_worker:
        resources["GPU"] = role.gpus_per_worker
    return TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "tokens": str(tokens.absolute()),
            "work": str(work.absolute()),
            "threads": role.threads,
            "gpu": role.gpus_per_worker > 0,
            "start": str(start.absolute()) if start else None,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=role.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if role.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name="train",
            storage_path=str(_ray_folder(work)),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """Runs in each Ray Train worker.

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
    hooks = Hooks(validate=validator(config, tokens, worker.device))
    start = Path(settings["start"]) if settings["start"] else None
    try:
        train(config, tokens, work, worker, hooks, start)
    except RaymillError as error:
        write_atomic(work / _ERROR, error_to_json(error))
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


def _show_progress(config: Config, metrics: Path, inputs: Inputs) -> None:
    """Shows the newest step, which rank 0 has written to its metrics file."""
    row = last_metrics(metrics)
    if row is None:
        inputs.progress.waiting("workers start")
    else:
        total = config.steps * config.global_batch_size * config.model.max_seq_len
        note = f"step {row['step']}/{config.steps}  loss {row['loss']:.3f}"
        inputs.progress.update(row["tokens"], total, "tokens", note)
        inputs.draft.checkpoint_clock()
