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

from raymill.artifact import Artifact, Kind
from raymill.cluster.config import RoleName
from raymill.cluster.interruptible import run_interruptible
from raymill.errors import MachineError, RaymillError
from raymill.stages.contract import Demand, Inputs
from raymill.training.loop import CHECKPOINTS, METRICS, TrainingConfig, last_metrics

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("tokens",)
MAY_TAKE: tuple[Kind, ...] = ("checkpoint",)
GIVES: Kind = "checkpoint"
ROLE: RoleName = "train"
LIVE = False


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
    import torch

    tokens, folder = inputs["tokens"], inputs.draft.path
    config.check_layout(config.num_workers)
    check_tokens(config, tokens.path)
    threads = cluster.config.roles.train.threads
    start = inputs.artifacts.get("checkpoint")
    cluster.connect()
    trainer = _trainer(config, tokens.path, folder, threads, start.path if start else None, cluster, inputs.run_folder)
    try:
        run_interruptible(trainer.fit, lambda: _show_progress(config, folder / METRICS, inputs))
    except Exception as error:
        raise _cause(error) from error
    finally:
        shutil.rmtree(_ray_folder(inputs.run_folder), ignore_errors=True)
    last = folder / CHECKPOINTS / f"step-{config.steps:08d}"
    for name in ("model.safetensors", "config.json", "optimizer.safetensors"):
        (last / name).rename(folder / name)
    shutil.rmtree(folder / CHECKPOINTS)
    (folder / ".writer").unlink(missing_ok=True)
    shutil.copyfile(tokens.file("tokenizer.json"), folder / "tokenizer.json")
    row = last_metrics(folder / METRICS)
    assert row is not None
    validation, seen_tokens, elapsed_s = row["validation"], row["tokens"], row["elapsed_s"]
    figures = {
        "validation_bits_per_byte": validation["bits_per_byte"],
        "validation_loss_nats": validation["loss_nats"],
        "parameters": config.model.num_parameters(tokens.figures["vocab_size"]),
        "train_tokens": seen_tokens,
        "tokens_per_s": seen_tokens / elapsed_s,
        # What the bits of this run depend on, beside its settings.
        "threads_per_worker": threads,
        "torch": torch.__version__,
    }
    summary = (
        f"validation {validation['bits_per_byte']:.3f} bits per byte "
        f"(unigram {tokens.figures['unigram_bits_per_byte']:.3f}, zstd -19 {tokens.figures['zstd19_bits_per_byte']:.3f}); "
        f"{figures['parameters'] / 1e6:.1f} M parameters, {seen_tokens / 1e6:.2f} M tokens at "
        f"{figures['tokens_per_s']:,.0f} tokens/s on {config.num_workers} workers"
    )
    return inputs.publish("train", GIVES, config, summary, figures)


def check_tokens(config: TrainingConfig, tokens: Path) -> None:
    """DataError, before any worker starts, when the splits cannot make a batch or a validation."""
    from raymill.dataset.loader import Loader
    from raymill.dataset.shards import TokenStream

    length = config.model.max_seq_len
    Loader(TokenStream(tokens, "train"), seq_len=length, global_batch_size=config.global_batch_size, seed=config.seed)
    Loader(TokenStream(tokens, "val"), seq_len=length, global_batch_size=1, seed=config.seed)


def _ray_folder(run_folder: Path) -> Path:
    """Where Ray Train keeps its own state while it runs; ours is in the draft."""
    return run_folder.absolute() / ".ray-train"


def _trainer(
    config: Config, tokens: Path, folder: Path, threads: int, start: Path | None, cluster: Cluster, run_folder: Path
) -> Any:
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
            "folder": str(folder.absolute()),
            "threads": threads,
            "start": str(start.absolute()) if start else None,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=role.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if role.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(_ray_folder(run_folder)),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    import torch

    from raymill.model.weights import default_device
    from raymill.training.loop import Hooks, train
    from raymill.training.parallel import Worker

    torch.set_num_threads(settings["threads"])
    config = Config.model_validate(settings["config"])
    tokens = Path(settings["tokens"])
    worker = Worker.current(default_device())
    hooks = Hooks(validate=validator(config, tokens))
    train(
        config, tokens, Path(settings["folder"]), worker, hooks, Path(settings["start"]) if settings["start"] else None
    )


def validator(config: TrainingConfig, tokens: Path) -> Any:
    """A function that scores a model on the val split, as `training.loop.Hooks` wants it."""
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.perplexity import evaluate_stream
    from raymill.model.weights import default_device

    stream = TokenStream(tokens, "val")

    def validate(model: Any) -> dict[str, float]:
        scores = evaluate_stream(
            model,
            stream,
            seq_len=config.model.max_seq_len,
            max_sequences=config.validation_sequences,
            batch_size=config.microbatch_size,
            device=default_device(),
        )
        return {"loss_nats": scores.loss_nats, "bits_per_byte": scores.bits_per_byte, "accuracy": scores.accuracy}

    return validate


def _show_progress(config: Config, metrics: Path, inputs: Inputs) -> None:
    """Shows the newest step, which rank 0 has written to its metrics file."""
    row = last_metrics(metrics)
    if row is not None:
        total = config.steps * config.global_batch_size * config.model.max_seq_len
        note = f"step {row['step']}/{config.steps}  loss {row['loss']:.3f}"
        inputs.progress.update(row["tokens"], total, "tokens", note)
        inputs.draft.checkpoint_clock()


def _cause(error: BaseException) -> RaymillError:
    """The user's error inside Ray's wrapping, or one that says where the worker's own words are."""
    seen: list[BaseException] = [error]
    for current in seen:
        if isinstance(current, RaymillError):
            return current
        failures = getattr(current, "worker_failures", None) or getattr(current, "_worker_failures", None) or {}
        inner = [current.__cause__, getattr(current, "cause", None), *failures.values()]
        seen += [each for each in inner if isinstance(each, BaseException) and each not in seen]
    why = str(seen[-1]).strip().splitlines()[-1][:300] if str(seen[-1]).strip() else type(seen[-1]).__name__
    return MachineError(
        "the training workers failed", why=why, fix="run the same command again: it continues from the last checkpoint"
    )
