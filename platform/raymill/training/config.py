"""The settings of a training run. No torch here: a job file is read, checked and planned without it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raymill.config import Config
from raymill.dataset.shards import PackingMethod
from raymill.errors import UsageError
from raymill.model.config import ModelConfig


class OptimizerConfig(Config):
    """How a step changes the weights."""

    name: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019)."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3
    """Peak learning rate; the schedule scales it."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled decay of matrices, per unit of learning rate; norm gains are not decayed."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; none means no clipping."""


class ScheduleConfig(Config):
    """Linear warmup, then decay to a fraction of the peak at the last step."""

    name: Literal["cosine"] = "cosine"
    """Half a cosine from the peak to the end (Loshchilov and Hutter 2017)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises linearly to its peak."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rate at the last step over the peak rate."""


class TrainingConfig(Config):
    """One training run, whoever places its workers."""

    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How a step changes the weights."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves over the run."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Optimizer updates."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences per step over all workers."""
    microbatch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences one worker runs at once; the rest of its share is accumulated."""
    packing: PackingMethod = "concat"
    """How documents fill sequences: concat cuts them where a sequence ends, best_fit cuts none that fits in one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of sequences."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints; at most this much is redone after a kill."""
    validate_every_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between validations; the last step always has one, over the whole val split."""
    validation_sequences: Annotated[int, Field(ge=1)] | None = 64
    """Sequences of a validation on the way, spread over the val split; none means all of it."""

    def check_layout(self, num_workers: int, key: str = "train") -> None:
        """UsageError unless the global batch divides over workers and microbatches."""
        share, rest = divmod(self.global_batch_size, num_workers)
        if rest or share % min(self.microbatch_size, share):
            raise UsageError(
                f"{key}.global_batch_size {self.global_batch_size} does not divide over {num_workers} workers "
                f"in microbatches of {self.microbatch_size}",
                fix=f"set it to a multiple of {num_workers * self.microbatch_size}",
            )
