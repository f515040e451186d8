"""The settings of a training run. No torch here: a job file is read, checked and planned without it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raymill.config import Config
from raymill.dataset.shards import PackingMethod
from raymill.errors import UsageError
from raymill.model.config import InitConfig, ModelConfig
from raymill.training.recipes import PRESETS, fill


class OptimizerConfig(Config):
    """How a step changes the weights. platform/TRAINING.md has the table of what each optimizer reads."""

    name: Literal["sgd", "adamw", "lion", "muon"] = "adamw"
    """sgd with Nesterov momentum; adamw (Loshchilov and Hutter 2019); lion (Chen et al. 2023); muon (Jordan 2024) for
    matrices inside blocks, in fp32, with adamw for embeddings, head and vectors."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3
    """Peak learning rate; the schedule scales it."""
    adamw_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """muon: peak rate of what adamw updates; none means learning_rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean (adamw, lion)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean (adamw), of the running mean (lion)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the gradient's running mean (sgd, muon)."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Added to the root of the squared gradient's mean (adamw)."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled decay of matrices, per unit of learning rate; vectors are not decayed."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; none means no clipping."""


class ScheduleConfig(Config):
    """Linear warmup to the peak rate, then by name down towards a fraction of it."""

    name: Literal["cosine", "linear", "step", "wsd"] = "cosine"
    """cosine: half a cosine (Loshchilov and Hutter 2017); linear; step: times factor at each milestone; wsd: constant,
    then linear over the last decay_fraction of the steps (Hu et al. 2024)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises linearly to its peak."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rate at the end of the run over the peak rate (cosine, linear, wsd); the last step's is a little above it."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which wsd decays."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of the steps after which step lowers the rate."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What step multiplies the rate by."""


class GuardConfig(Config):
    """What happens when a step goes wrong. Every case is written to events.jsonl with its shards and rows."""

    on_nan: Literal["skip", "roll_back", "stop"] = "stop"
    """A loss or gradient norm that is not finite. skip: leave the weights as they are and go on; roll_back: go back to
    the newest checkpoint and leave the step's sequences out; stop."""
    on_spike: Literal["skip", "roll_back", "stop"] | None = None
    """A loss far above those before it; none means it is not looked for."""
    spike_deviations: Annotated[float, Field(gt=0)] = 6.0
    """A spike is a loss this many standard deviations above the mean of the window."""
    spike_window: Annotated[int, Field(ge=2, le=10000)] = 50
    """Steps in that window."""
    max_events: Annotated[int, Field(ge=1)] = 10
    """Skipped or rolled back steps after which the run stops."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a finished step after which a worker writes down its stacks and ends, to be started again."""


class EarlyStoppingConfig(Config):
    """The end of a run that no longer gets better."""

    metric: Literal["loss_nats", "accuracy"] = "loss_nats"
    """Figure of the validations on the way."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Validations without a new best after which the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as better."""


class LayoutConfig(Config):
    """How the model lies over the workers. num_workers = copies x tensor x pipeline x context."""

    data: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every copy whole, bits equal for any number of workers; fsdp: weights, gradients and optimizer state in
    shards (FSDP2, as ZeRO-3); hsdp: shards inside groups of shard workers, copies of the groups."""
    shard: Annotated[int, Field(ge=2)] | None = None
    """hsdp: workers that share one copy."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Workers each matrix is split over; divides num_heads, num_kv_heads and hidden_dim."""
    pipeline: Annotated[int, Field(ge=1)] = 1
    """Workers the blocks are split over; divides num_layers."""
    context: Annotated[int, Field(ge=1)] = 1
    """Workers each sequence is split over; divides max_seq_len."""

    @property
    def model_size(self) -> int:
        """Workers that hold one copy together, but for data sharding."""
        return self.tensor * self.pipeline * self.context


class TrainingConfig(Config):
    """One training run, whoever places its workers."""

    preset: Literal["tiny", "small", "124m", "1b"] | None = None
    """A tuned recipe (training/recipes.py) for what is not set beside it."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    init: InitConfig = InitConfig()
    """The draw of the first weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How a step changes the weights."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves over the run."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a running mean of the weights, which is validated and published instead; none means no mean."""
    early_stopping: EarlyStoppingConfig | None = None
    """The end of a run that no longer gets better; none means all steps are done."""
    guard: GuardConfig = GuardConfig()
    """What happens when a step goes wrong."""
    layout: LayoutConfig = LayoutConfig()
    """How the model lies over the workers."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Optimizer updates."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences per step over all workers."""
    microbatch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences one worker runs at once; divides global_batch_size."""
    packing: PackingMethod = "concat"
    """How documents fill sequences: concat cuts them where a sequence ends, best_fit cuts none that fits in one."""
    mask_documents: bool = True
    """Attention stays inside a document."""
    precision: Literal["fp32", "bf16", "fp8", "int8"] | None = None
    """Arithmetic of the matrices: bf16 and fp8 on GPUs, int8 on CPUs with VNNI; none means bf16 on GPUs, fp32 on CPUs.
    Weights and optimizer state are fp32 always."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the model: a minute or more at the start, faster steps on GPUs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, of the order of sequences and of dropout."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints; at most this much is redone after a kill."""
    validate_every_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between validations; the last step always has one, over the whole val split."""
    validation_sequences: Annotated[int, Field(ge=1)] | None = 64
    """Sequences of a validation on the way, spread over the val split; none means all of it."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("preset"), str) and values["preset"] in PRESETS:
            return fill(values, PRESETS[values["preset"]])
        return values

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step over all workers; their gradients are added in one order for any number of workers."""
        return self.global_batch_size // min(self.microbatch_size, self.global_batch_size)

    def check_layout(self, num_workers: int, key: str = "train") -> None:
        """UsageError unless batch, model and layout divide over the workers."""
        layout, model = self.layout, self.model
        micro = min(self.microbatch_size, self.global_batch_size)
        copies, rest = divmod(num_workers, layout.model_size)
        if self.global_batch_size % micro:
            raise UsageError(
                f"{key}.microbatch_size {micro} does not divide {key}.global_batch_size {self.global_batch_size}",
                fix=f"set {key}.global_batch_size to a multiple of {micro}",
            )
        if rest:
            raise UsageError(
                f"{key}.num_workers {num_workers} is not a multiple of tensor x pipeline x context = {layout.model_size}",
                fix=f"set {key}.num_workers to a multiple of {layout.model_size}",
            )
        for name, size, parts in (
            ("num_heads", model.num_heads, layout.tensor),
            ("num_kv_heads", model.num_kv_heads, layout.tensor),
            ("hidden_dim", model.hidden_dim, layout.tensor),
            ("num_layers", model.num_layers, layout.pipeline),
            ("max_seq_len", model.max_seq_len, layout.context),
        ):
            if size % parts:
                raise UsageError(
                    f"{key}.model.{name} {size} does not divide over {parts} workers of {key}.layout",
                    fix=f"set {key}.model.{name} to a multiple of {parts}, or change {key}.layout",
                )
        if layout.data == "hsdp" and (layout.shard is None or copies % layout.shard):
            raise UsageError(
                f"{key}.layout.shard {layout.shard} does not divide the {copies} workers of hsdp",
                fix=f"set {key}.layout.shard to a divisor of {copies}",
            )
        if layout.data != "hsdp" and layout.shard is not None:
            raise UsageError(
                f"{key}.layout.shard is for hsdp; {key}.layout.data is {layout.data}",
                fix=f"set {key}.layout.data to hsdp, or leave shard out",
            )
        shards = {"ddp": 1, "fsdp": copies, "hsdp": layout.shard or 1}[layout.data]
        axes = (copies // shards, shards, layout.tensor, layout.pipeline, layout.context)
        if sum(size > 1 for size in axes) > 3:
            raise UsageError(
                f"{key}.layout splits {num_workers} workers along {sum(size > 1 for size in axes)} axes (copies, shards, "
                "tensor, pipeline, context); at most three together were tried",
                fix=f"set one of {key}.layout.tensor, pipeline and context to 1, or {key}.layout.data to fsdp",
            )
        uneven = layout.data == "ddp" and layout.model_size == 1
        if copies > self.num_microbatches or (self.num_microbatches % copies and not uneven):
            raise UsageError(
                f"{key}.global_batch_size {self.global_batch_size} in microbatches of {micro} makes "
                f"{self.num_microbatches} of them, which do not divide over {copies} copies of the model",
                fix=f"set {key}.global_batch_size to a multiple of {copies * micro}",
            )
