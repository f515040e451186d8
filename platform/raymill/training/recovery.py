"""A short recovery run: a pruned model trained a little more, in this process, at a low rate that falls to zero.

The rate has to fall: at a constant one a model that was trained out becomes worse by more than a small cut costs.

The loop is the one of every training; only what it starts from and how little it does are special. Costs what so many
steps of training cost. Zeros of unstructured pruning would be filled again: it is for models that lost whole parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from raymill.model.files import read_model_config
from raymill.training.checkpoint import CHECKPOINTS, newest_checkpoint
from raymill.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from raymill.training.loop import Hooks, train
from raymill.training.metrics import StepMetrics
from raymill.training.parallel.worker import Worker
from raymill.training.validation import Validate


def recover(
    start: Path,
    tokens: Path,
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    validate: Validate,
    on_step: Callable[[StepMetrics], None],
) -> Path:
    """Trains the model in `start` on the train split; what it needs lies in `folder`. Returns the checkpoint's folder.

    `validate` scores it once, at its end.

    DataError when the split is too small for one batch.
    """
    config = TrainingConfig(
        model=read_model_config(start)[0],
        optimizer=OptimizerConfig(name="adamw", learning_rate=learning_rate, weight_decay=0.0),
        schedule=ScheduleConfig(name="linear", warmup_steps=min(10, steps // 5), final_fraction=0.0),
        steps=steps,
        global_batch_size=batch_size,
        microbatch_size=batch_size,
        checkpoint_every_steps=steps,
        validate_every_steps=steps,
    )
    train(config, tokens, folder, Worker(0, 1, torch.device("cpu")), Hooks(validate=validate, on_step=on_step), start)
    found = newest_checkpoint(folder / CHECKPOINTS, lambda _: None)
    assert found is not None
    return found[0]
