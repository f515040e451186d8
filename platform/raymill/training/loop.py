"""The one training loop: token shards in, a trained model out, through checkpoints that make a kill harmless.

It runs in every worker. The same seed, settings, worker count and thread count give the same bits, whether or not the
run was killed on the way: batches are a function of the step, checkpoints hold everything else that a step reads.

Below Ray: it speaks to the outside through `Hooks` alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymill.dataset.loader import Batch, Loader
from raymill.dataset.shards import TokenStream
from raymill.errors import DataError
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model
from raymill.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    only_writer,
    save_checkpoint,
)
from raymill.training.config import TrainingConfig
from raymill.training.losses import next_token
from raymill.training.metrics import METRICS, StepMetrics, append_metrics, truncate_metrics
from raymill.training.optimizer import build_optimizer
from raymill.training.parallel.worker import Worker
from raymill.training.schedule import learning_rate_at


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """How the loop tells its surroundings what happens; all run on rank 0 only."""

    validate: Callable[[nn.Module, int | None], dict[str, float | None]]
    """Scores the model on that many sequences of the val split, None for all of it."""
    on_step: Callable[[StepMetrics], None] = _ignore
    on_checkpoint: Callable[[Path], None] = _ignore


@dataclass
class _State:
    """Everything one worker holds during a run."""

    config: TrainingConfig
    worker: Worker
    hooks: Hooks
    folder: Path
    loader: Loader
    model: Transformer
    end_id: int
    optimizer: torch.optim.Optimizer = field(init=False)
    wrapped: nn.Module = field(init=False)
    step: int = 0
    earlier_s: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.model, self.config.optimizer)


def train(
    config: TrainingConfig, tokens: Path, folder: Path, worker: Worker, hooks: Hooks, start: Path | None = None
) -> Transformer:
    """Trains from the newest checkpoint in `folder`, or from `start`'s weights, or from a seeded draw.

    `tokens` holds token shards; checkpoints and metrics.jsonl go to `folder`. Every worker calls it; every worker
    returns the trained model. Raises DataError for a split too small for one batch and when the loss is not finite.
    """
    if worker.rank == 0:
        with only_writer(folder):
            return _train(config, tokens, folder, worker, hooks, start)
    return _train(config, tokens, folder, worker, hooks, start)


def _train(
    config: TrainingConfig, tokens: Path, folder: Path, worker: Worker, hooks: Hooks, start: Path | None
) -> Transformer:
    state = _prepare(config, tokens, folder, worker, hooks, start)
    started = time.monotonic()
    while state.step < config.steps:
        loss, gradient_norm, rate = _one_step(state)
        state.step += 1
        last = state.step == config.steps
        if not math.isfinite(loss):
            raise DataError(
                f"the loss of step {state.step} is {loss}",
                why=f"gradient norm {gradient_norm}, learning rate {rate:g}",
                fix="lower train.optimizer.learning_rate or set train.optimizer.clip_norm",
            )
        if worker.rank == 0:
            elapsed_s = round(state.earlier_s + time.monotonic() - started, 3)
            validation = None
            if last or state.step % config.validate_every_steps == 0:
                validation = hooks.validate(state.model, None if last else config.validation_sequences)
            tokens_seen = state.step * config.global_batch_size * config.model.max_seq_len
            metrics = StepMetrics(state.step, loss, rate, gradient_norm, tokens_seen, elapsed_s, validation)
            append_metrics(folder / METRICS, metrics)
            hooks.on_step(metrics)
            if last or state.step % config.checkpoint_every_steps == 0:
                path = save_checkpoint(folder / CHECKPOINTS, state.step, state.model, state.optimizer, state.end_id)
                hooks.on_checkpoint(path)
    worker.barrier()
    return state.model


def _prepare(
    config: TrainingConfig, tokens: Path, folder: Path, worker: Worker, hooks: Hooks, start: Path | None
) -> _State:
    stream = TokenStream(tokens, "train")
    loader = Loader(
        stream,
        seq_len=config.model.max_seq_len,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        packing=config.packing,
    )
    if start is None:
        model = Transformer(config.model, stream.index.vocab_size)
        model.initialize(config.seed)
    else:
        model = load_model(start)
    state = _State(config, worker, hooks, folder, loader, model.to(worker.device), stream.index.end_of_document_id)
    # One rank looks, all load the same: two looks could differ while a dying writer still publishes.
    found = newest_checkpoint(folder / CHECKPOINTS, _ignore) if worker.rank == 0 else None
    state.step = worker.agree(found[1] if found is not None else 0)
    if state.step:
        load_checkpoint(checkpoint_path(folder / CHECKPOINTS, state.step), state.model, state.optimizer)
    if worker.rank == 0:
        state.earlier_s = truncate_metrics(folder / METRICS, state.step)
    state.wrapped = worker.wrap(state.model)
    if worker.world_size > 1:
        # DDP arranges its buckets anew after the first backward pass, and the order of a sum over more than two workers
        # depends on them. One pass that is thrown away puts a fresh and a continued run into the same arrangement.
        blank = torch.zeros(1, config.model.max_seq_len, dtype=torch.int64, device=worker.device)
        state.wrapped(blank, None, next_token(blank)).backward()
        state.optimizer.zero_grad()
    return state


def _one_step(state: _State) -> tuple[float, float, float]:
    """One optimizer update. Returns the loss over the global batch, the gradient's norm before clipping, the rate."""
    config, worker = state.config, state.worker
    share = config.global_batch_size // worker.world_size
    microbatch = min(config.microbatch_size, share)
    rate = learning_rate_at(state.step, config.steps, config.optimizer.learning_rate, config.schedule)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad()
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=worker.device.type == "cuda")
    total = torch.zeros((), device=worker.device)
    count = share // microbatch
    learned = state.loader.learned_targets(state.step)
    for index in range(count):
        first = worker.rank * share + index * microbatch
        batch = state.loader.batch(state.step, first, microbatch)
        if index < count - 1:
            with worker.without_sync(state.wrapped):
                loss = _backward(state, batch, learned, mixed)
        else:
            loss = _backward(state, batch, learned, mixed)
        total += loss
    limit = config.optimizer.clip_norm if config.optimizer.clip_norm is not None else math.inf
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    state.optimizer.step()
    return worker.mean(total).item(), norm.item(), rate


def _backward(state: _State, batch: Batch, learned: int, mixed: Any) -> torch.Tensor:
    """Adds a microbatch's gradients. Its loss is this worker's part of the mean over the `learned` targets of the step.

    Workers' gradients and losses are averaged later, so a part is the sum over its targets x world_size / learned: the
    same step however the batch is cut. Where nothing is ignored the divisor is a whole number, to the bit.
    """
    device = state.worker.device
    documents_BT = batch.documents_BT.to(device) if state.config.mask_documents else None
    with mixed:
        total = state.wrapped(batch.inputs_BT.to(device), documents_BT, next_token(batch.targets_BT.to(device)))
        loss: torch.Tensor = total / (max(1, learned) / state.worker.world_size)
    loss.backward()
    return loss.detach()
