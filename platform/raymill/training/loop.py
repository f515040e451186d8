"""The one training loop: token shards in, a trained model out, through checkpoints that make a kill harmless.

It runs in every worker. A step: placement.backward, guard, clip, optimizer, metrics. Batches are a function of the step
and checkpoints hold everything else that a step reads; gradients are added in one order. So under the layout ddp the same
seed, settings and threads give the same bits, killed on the way or not, on any number of workers.

Validations and checkpoints are copied aside and done by `background` in the order of their steps; the loop pays for the
copy. A checkpoint that is there implies that every validation up to its step was written.

Below Ray: it speaks to the outside through `Hooks` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raymill.artifact import sync
from raymill.dataset.loader import Loader
from raymill.dataset.shards import TokenStream
from raymill.model.files import WEIGHTS
from raymill.model.transformer import Transformer
from raymill.model.weights import read_weights
from raymill.telemetry.metrics import resident_bytes
from raymill.training.background import Background
from raymill.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Files,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    only_writer,
    write_checkpoint,
)
from raymill.training.config import TrainingConfig
from raymill.training.early_stopping import should_stop
from raymill.training.flops import peak_flops, training_flops_per_token, utilization
from raymill.training.guard import (
    EVENTS,
    Action,
    Guard,
    Kind,
    append_event,
    batch_number,
    left_out,
    make_event,
    read_events,
    stop_error,
    truncate_events,
)
from raymill.training.metrics import (
    METRICS,
    VALIDATION,
    StepMetrics,
    ValidationMetrics,
    append_metrics,
    read_rows,
    truncate_metrics,
)
from raymill.training.parallel.worker import Worker
from raymill.training.schedule import learning_rate_scale
from raymill.training.snapshot import Snapshot
from raymill.training.state import TrainingState
from raymill.training.tensorboard import TENSORBOARD, TensorBoard
from raymill.training.validation import Validate, Validations
from raymill.training.watchdog import Watchdog


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """How the loop tells its surroundings what happens; all but `warn` run on rank 0 only."""

    validate: Validate
    on_step: Callable[[StepMetrics], None] = _ignore
    on_validation: Callable[[ValidationMetrics], None] = _ignore
    warn: Callable[[str], None] = _ignore
    """Told what was found wrong and got round: a damaged checkpoint, and by any rank that it hangs."""


def train(
    config: TrainingConfig, tokens: Path, folder: Path, worker: Worker, hooks: Hooks, start: Path | None = None
) -> None:
    """Trains from the newest checkpoint in `folder`, or from `start`'s weights, or from a seeded draw.

    `tokens` holds token shards; checkpoints, metrics.jsonl, validation.jsonl and events.jsonl go to `folder`. Every
    worker calls it. Raises DataError for a split too small for one batch and when a guard stops the run, MachineError
    when no checkpoint can be written.
    """
    holder = only_writer(folder) if worker.rank == 0 else nullcontext()
    with holder:
        while not _Run(config, tokens, folder, worker, hooks, start).finish():
            pass  # rolled back: from the newest checkpoint, without the batch that went wrong


class _Run:
    """One worker's course from the newest checkpoint to the end, or to a step that is rolled back."""

    def __init__(
        self, config: TrainingConfig, tokens: Path, folder: Path, worker: Worker, hooks: Hooks, start: Path | None
    ) -> None:
        self._config, self._folder, self._worker, self._hooks = config, folder, worker, hooks
        stream = TokenStream(tokens, "train")
        self._loader = Loader(
            stream,
            seq_len=config.model.max_seq_len,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            packing=config.packing,
        )
        vocab_size = stream.index.vocab_size
        self._config_json = config.model.to_hugging_face(vocab_size, stream.index.end_of_document_id)
        found = self._newest()
        self._step = found.step if found is not None else 0
        self._ended = found is not None and bool(found.state["ended"])
        self._state = TrainingState(config, self._build_model(vocab_size, start, found), worker)
        self._machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": worker.device.type}
        if found is not None:
            self._state.load(found.files, found.state["updates"])
            self._compare_machine(found.state["machine"])
        events = read_events(folder / EVENTS)
        self._left_out = left_out(events)
        rows = read_rows(folder / METRICS)
        self._guard = Guard.resume(config.guard, rows, events)
        self._began_s = time.monotonic() - (rows[-1]["elapsed_s"] if rows else 0.0)
        device = "cpu" if worker.device.type == "cpu" else torch.cuda.get_device_name(worker.device)
        precision = config.precision or ("bf16" if worker.device.type == "cuda" else "fp32")
        self._peak = peak_flops(device, precision, torch.get_num_threads()) if worker.rank == 0 else None
        self._flops = training_flops_per_token(config.model, vocab_size, config.model.max_seq_len)
        self._watchdog = Watchdog(folder, worker.rank, config.guard.hang_timeout_s, hooks.warn)
        self._background = Background(self._watchdog.wait)
        self._validations = Validations(
            folder, config.model, vocab_size, worker.device, self._background, hooks.validate
        )
        self._snapshot = Snapshot()
        self._board = TensorBoard(folder / TENSORBOARD, self._step) if config.tensorboard and worker.rank == 0 else None

    def finish(self) -> bool:
        """Runs to the last step, or to one that early stopping makes the last. False when a step was rolled back."""
        with self._background:
            ended = self._run_steps()
        self._tell_validations()
        if self._board is not None:
            self._board.close()
        return ended

    def _run_steps(self) -> bool:
        first = self._step
        with self._watchdog:
            while not self._ended:
                began_s = time.monotonic()
                loss, norm, rate, found = self._run_step()
                if found is not None and found[1] == "roll_back":
                    return False
                self._step += 1
                last = self._is_last()
                if self._worker.rank == 0:
                    self._tell(loss, norm, rate, time.monotonic() - began_s, f"{found[0]}_skipped" if found else None)
                if self._step == first + 1:
                    self._make_room()
                self._validate_and_save(last)
                self._ended = last
                self._watchdog.beat(self._step)
        return True

    def _newest(self) -> Checkpoint | None:
        """Rank 0 looks and cuts back what tells of later steps; all load the same."""
        step = 0
        if self._worker.rank == 0:
            found = newest_checkpoint(self._folder / CHECKPOINTS, self._hooks.warn)
            step = found[1] if found is not None else 0
            truncate_metrics(self._folder, step)
            truncate_events(self._folder / EVENTS, step)
        step = self._worker.agree(step)
        return load_checkpoint(checkpoint_path(self._folder / CHECKPOINTS, step)) if step else None

    def _compare_machine(self, began: dict[str, Any]) -> None:
        """Says what the bits depend on and is not as it was when the checkpoint was written."""
        changed = [f"{name} {began[name]}, now {now}" for name, now in self._machine.items() if began[name] != now]
        if changed and self._worker.rank == 0:
            self._hooks.warn(f"the checkpoint was made with {'; '.join(changed)}: the bits will be others from here on")

    def _build_model(self, vocab_size: int, start: Path | None, found: Checkpoint | None) -> Transformer:
        model = Transformer(self._config.model, vocab_size)
        if found is None and start is None:
            model.initialize(self._config.seed, self._config.init)
            return model
        if found is not None:
            weights = found.files[WEIGHTS]
        else:
            assert start is not None
            weights = read_weights(start, self._config.model, vocab_size)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def _run_step(self) -> tuple[float, float, float, tuple[Kind, Action] | None]:
        """One step. Returns loss, norm of the gradient before clipping, learning rate, and what went wrong if it did."""
        config, state = self._config, self._state
        batch = batch_number(self._step, self._left_out)
        size = config.global_batch_size // config.num_microbatches
        numbers = state.placement.microbatches()
        batches = (self._loader.batch(batch, number * size, size) for number in numbers)
        loss = float(state.placement.backward(batches, self._loader.learned_targets(batch), self._step))
        norm = float(state.placement.gradient_norm())
        scale = learning_rate_scale(self._step, config.steps, config.schedule)
        found = self._guard.verdict(loss, norm)
        if found is None:
            state.update(scale, norm)
        else:
            self._went_wrong(found, batch, loss, norm)
        state.forget_gradients()
        return loss, norm, scale * config.optimizer.learning_rate, found

    def _went_wrong(self, found: tuple[Kind, Action], batch: int, loss: float, norm: float) -> None:
        """Writes the event down. Raises DataError when the run is to stop."""
        event = make_event(self._step + 1, batch, found, loss, norm, self._loader.places(batch))
        path = self._folder / EVENTS
        if self._worker.rank == 0:
            append_event(path, event)
        if found[1] == "stop":
            self._worker.barrier()
            raise stop_error(event, self._config.guard, len(read_events(path)))

    def _is_last(self) -> bool:
        """Whether the step just done ends the run. Early stopping asks the validations before this one, so that when
        they end decides nothing."""
        config = self._config
        if self._step == config.steps:
            return True
        if config.early_stopping is None or self._step % config.validate_every_steps:
            return False
        stop = False
        if self._worker.rank == 0:
            self._background.finish()
            stop = should_stop(read_rows(self._folder / VALIDATION), config.early_stopping)
        return bool(self._worker.agree(int(stop)))

    def _make_room(self) -> None:
        """The memory of a save is made beside training, once a first step has made all there is to save."""
        files = self._state.files()
        if self._worker.rank == 0:
            self._background.submit("reserve", partial(self._snapshot.reserve, files))

    def _validate_and_save(self, last: bool) -> None:
        config, rank = self._config, self._worker.rank
        if last or self._step % config.validate_every_steps == 0:
            weights = self._state.published()
            if rank == 0:
                sequences = None if last else config.validation_sequences
                self._validations.submit(self._step, self._elapsed_s(), weights, sequences)
        if last or self._step % config.checkpoint_every_steps == 0:
            files = self._state.files()
            if rank == 0:
                copies = self._snapshot.take(files, self._background.acquire)
                kept = {"ended": last, "updates": self._state.updates, "machine": self._machine}
                save = partial(self._save, self._step, copies, kept)
                self._background.submit("save", save, after=self._snapshot.release)

    def _save(self, step: int, copies: Files, kept: dict[str, Any]) -> None:
        sync(self._folder / METRICS)  # a checkpoint without the rows before it would leave a hole in the curve
        write_checkpoint(self._folder / CHECKPOINTS, step, copies, self._config_json, kept)

    def _tell(self, loss: float, norm: float, rate: float, step_s: float, event: str | None) -> None:
        config = self._config
        tokens = config.global_batch_size * config.model.max_seq_len
        metrics = StepMetrics(
            step=self._step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=self._step * tokens,
            tokens_per_s=tokens / step_s,
            mfu=utilization(tokens / step_s, self._flops, self._peak, self._worker.world_size),
            memory_bytes=self._memory_bytes(),
            elapsed_s=round(self._elapsed_s(), 3),
            event=event,
        )
        append_metrics(self._folder / METRICS, metrics)
        if self._board is not None:
            self._board.add_step(metrics)
        self._hooks.on_step(metrics)
        self._tell_validations()

    def _tell_validations(self) -> None:
        for row in self._validations.take_done():
            if self._board is not None:
                self._board.add_validation(row)
            self._hooks.on_validation(row)

    def _memory_bytes(self) -> int:
        device = self._worker.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s
