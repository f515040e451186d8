"""The memory a training run will need, from its settings alone, and which setting to turn where it does not fit.

In: the settings, the vocabulary, the workers. Out: bytes by what holds them, on the worker that needs most: rank 0, which
also holds copies for checkpoints and validations. Everything is counted from the shapes of what the code keeps; the only
figures that were measured are a process without a model, and what the heap loses. No torch here: planning takes
microseconds.

Two moments compete for the peak: the end of a microbatch's forward pass, when its activations are complete, and the
optimizer's step, when they are gone. Gradients count fully beside activations, also in a step's first microbatch, where
the one come as the others go: glibc's heap seldom gives them the same place.

Letters in comments: N positions of a microbatch, D model_dim, F hidden_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raymill.errors import UsageError
from raymill.training.config import TrainingConfig

Device = Literal["cpu", "cuda"]

PROCESS_BYTES: dict[Device, int] = {"cpu": 387_000_000, "cuda": 600_000_000}
"""A process that trains next to nothing. cpu: python 6 %, torch and what it loads as it steps 48 %, numba and its loops
46 %, resident; cuda: the driver's context and the matrix library's workspace, on the GPU."""
_HEAP_SHARE: dict[Device, float] = {"cpu": 0.15, "cuda": 0.05}
"""What lies unused between tensors that live longer and shorter, of all that a step holds. cpu: between none and 0.47
where it was measured, the more the smaller the model; a heap that loses nothing (every tensor over 1 MB mapped by itself)
costs 12 % of the speed. cuda: not measured."""
_FP32 = 4
_HALF = 2
LOSS_ROWS: dict[Device, int] = {"cpu": 256, "cuda": 4096}
"""Rows of logits that the loss has at once (training/losses.py, which would bring torch)."""
_LOSS_TENSORS: dict[Device, int] = {"cpu": 1, "cuda": 3}
"""fp32 tensors of those rows. cpu: slopes are written over the logits; cuda, bf16: 2 + 4 bytes for
logits, 4 + 2 for slopes."""
_SCORED_ROWS = 2048
"""Rows of logits that a validation normalises at once (evaluation/perplexity.py)."""


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one worker at the peak of a run, by what holds them."""

    process_bytes: int
    """The process without its model."""
    weights_bytes: int
    """The parameters, fp32; sharded layouts: this worker's shard and what is gathered of the others at once."""
    gradients_bytes: int
    """The gradients of the step, and the sums of earlier microbatches that wait to be added."""
    optimizer_bytes: int
    """What the optimizer keeps from step to step."""
    ema_bytes: int
    """The running mean of the weights."""
    snapshot_bytes: int
    """The copy that a checkpoint is written from while training goes on."""
    validation_bytes: int
    """The copy that is validated while training goes on, and the logits of its batch."""
    activations_bytes: int
    """What the forward pass keeps for the backward pass, and what the backward pass of a block makes on the way."""
    logits_bytes: int
    """What the loss needs: some rows of logits, the gradients of the hidden states and of the head."""
    update_bytes: int
    """What the optimizer makes on the way while it steps; not there at the same time as activations and logits."""
    vocab_size: int
    num_workers: int
    device: Device

    @property
    def heap_bytes(self) -> int:
        """What is lost between tensors."""
        return round(_HEAP_SHARE[self.device] * self._step_bytes)

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.process_bytes + self._step_bytes + self.heap_bytes + self.snapshot_bytes + self.validation_bytes

    @property
    def _step_bytes(self) -> int:
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes
        return kept + max(self.activations_bytes + self.logits_bytes, self.update_bytes)


def predict(
    config: TrainingConfig, vocab_size: int, num_workers: int, device: Device, process_bytes: int | None = None
) -> MemoryPrediction:
    """The peak of the worker that needs most. process_bytes: where the process holds more than PROCESS_BYTES says.

    UsageError where the layout does not divide over the workers.
    """
    config.check_layout(num_workers)
    held = _Held(config, vocab_size, num_workers, device)
    return MemoryPrediction(
        process_bytes=PROCESS_BYTES[device] if process_bytes is None else process_bytes,
        weights_bytes=held.weights(),
        gradients_bytes=held.gradients(),
        optimizer_bytes=held.optimizer(),
        ema_bytes=held.mean(),
        snapshot_bytes=held.snapshot(),
        validation_bytes=held.validation(),
        activations_bytes=held.activations(),
        logits_bytes=held.logits(),
        update_bytes=held.update(),
        vocab_size=vocab_size,
        num_workers=num_workers,
        device=device,
    )


class _Held:
    """What one worker holds of a run, in numbers, each method in bytes."""

    def __init__(self, config: TrainingConfig, vocab_size: int, num_workers: int, device: Device) -> None:
        layout, model = config.layout, config.model
        self._config, self._model, self._vocab_size, self._device = config, model, vocab_size, device
        self.copies = num_workers // layout.model_size
        """Workers that read different microbatches."""
        self._shards = {"ddp": 1, "fsdp": self.copies, "hsdp": layout.shard or 1}[layout.data]
        self._sharded = layout.data != "ddp"
        self._whole = not self._sharded and layout.model_size == 1
        self.microbatches = -(-config.num_microbatches // self.copies)
        self._sequences = min(config.microbatch_size, config.global_batch_size)
        self._layers = model.num_layers // layout.pipeline
        self._length = model.max_seq_len // layout.context
        self._rows = self._sequences * self._length
        heads, keys = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
        self._queries, self._keys = heads // layout.tensor, keys // layout.tensor
        self._hidden = model.hidden_dim // layout.tensor
        attention = 2 * model.model_dim * (self._queries + self._keys)
        self._block = attention + (3 if model.gated else 2) * model.model_dim * self._hidden
        """Weights of a block's matrices."""
        self._embeddings = vocab_size * model.model_dim
        ends = (1 if model.tie_embeddings or layout.pipeline > 1 else 2) * self._embeddings
        self._rest = ends + (0 if model.rotary else model.max_seq_len * model.model_dim)
        self._parameters = self._layers * self._block + self._rest

    def weights(self) -> int:
        own = self._parameters * _FP32 // self._shards
        cast = self._half and not self._sharded  # autocast keeps the half copy of every matrix for the step
        # A block is gathered while the one before it runs; what no block holds stays gathered.
        gathered = (2 * self._block + self._rest) * (_HALF if self._half else _FP32) if self._sharded else 0
        return own + gathered + (self._parameters * _HALF if cast else 0)

    def gradients(self) -> int:
        own = self._parameters * _FP32
        if self._sharded:
            return own // self._shards + (own if self.microbatches > 1 else self._block * _FP32)
        if not self._whole:
            return own
        if self.copies == 1:
            return own * _sums_held(self._config.num_microbatches)
        # parallel/reduction.py: a flat gradient for each sum held here, and room for one slice of all that all hold
        nodes = max(1, (self.microbatches - 1).bit_length()) if self.microbatches & (self.microbatches - 1) else 1
        return own * (_sums_held(self.microbatches) + 2 * nodes)

    def optimizer(self) -> int:
        return self._moments() * _FP32 // self._shards

    def mean(self) -> int:
        return self._parameters * _FP32 // self._shards if self._config.ema_decay is not None else 0

    def snapshot(self) -> int:
        """On rank 0, whole; on a GPU it lies in the computer's memory, and only what is gathered for it on the GPU."""
        if self._device == "cuda" and self._whole:
            return 0
        layout = self._config.layout
        parts = layout.tensor * layout.pipeline
        state = (self._parameters + self._moments()) * _FP32 * parts
        state += self._parameters * _FP32 * parts if self._config.ema_decay is not None else 0
        return state if self._whole or self._device == "cuda" else 2 * state

    def validation(self) -> int:
        rows = self._sequences * self._model.max_seq_len
        logits = (rows + min(rows, _SCORED_ROWS)) * self._vocab_size * _FP32
        passing = rows * (3 * self._model.model_dim + 3 * self._model.hidden_dim) * _FP32
        return self._model.num_parameters(self._vocab_size) * _FP32 + logits + passing

    def activations(self) -> int:
        """Microbatches in flight times blocks times what each keeps; checkpointing keeps the inputs of all but one."""
        kept = self._kept_by_a_block()
        flying = min(self._config.layout.pipeline, self.microbatches)
        stream = self._rows * self._model.model_dim * _FP32
        blocks = self._layers * stream + kept if self._config.activation_checkpointing else self._layers * kept
        # Backward of a block: gradients of its widest activations, and of what it passes on.
        passing = self._rows * (3 * self._hidden * self._width + 2 * self._model.model_dim * _FP32)
        return flying * blocks + passing + 2 * stream

    def logits(self) -> int:
        """Rows of logits while gradients are made of them, and those gradients."""
        made = self._rows * self._model.model_dim * _FP32 + self._embeddings * _FP32
        chunk = min(self._rows, LOSS_ROWS[self._device]) * self._vocab_size * _FP32
        return made + _LOSS_TENSORS[self._device] * chunk

    def update(self) -> int:
        """muon: every update, and what it is made from; lion: that of one tensor."""
        matrices = self._layers * self._block * _FP32
        if self._config.optimizer.name == "muon":
            return 2 * matrices
        return max(self._embeddings, self._block) * _FP32 if self._config.optimizer.name == "lion" else 0

    @property
    def _half(self) -> bool:
        precision = self._config.precision or ("bf16" if self._device == "cuda" else "fp32")
        return precision in ("bf16", "fp8")

    @property
    def _width(self) -> int:
        """Bytes of a number between matrices."""
        return _HALF if self._half else _FP32

    def _moments(self) -> int:
        """Numbers the optimizer keeps for this worker's parameters before they are sharded."""
        optimizer, matrices = self._config.optimizer, self._layers * self._block
        return {
            "sgd": self._parameters if optimizer.momentum else 0,
            "lion": self._parameters,
            "adamw": 2 * self._parameters,
            "muon": 2 * self._parameters - matrices,
        }[optimizer.name]

    def _kept_by_a_block(self) -> int:
        """Inputs of both norms (fp32) and of the matrices, queries, keys, values and what attention made of them.

        What reads a norm's output makes it again on a CPU (model/linear.py).
        """
        model, dim = self._model, self._model.model_dim
        turned = self._queries + self._keys
        again = self._device == "cpu" and model.gated and not self._half and self._config.layout.tensor == 1
        numbers = (0 if again else 2 * dim) + turned + self._keys + self._queries
        numbers += turned if model.qk_norm else 0
        numbers += (3 if model.gated and not again else 2) * self._hidden
        return self._rows * (2 * dim * _FP32 + numbers * self._width)


def _sums_held(num_microbatches: int) -> int:
    """Gradients of one worker that wait at once in the tree of parallel/reduction.py."""
    if num_microbatches <= 2:
        return 1
    left = 1 << (num_microbatches - 1).bit_length() - 1
    right = num_microbatches - left
    return max(_sums_held(left), 1 if right == 1 else 1 + _sums_held(right))


def describe(prediction: MemoryPrediction) -> str:
    """`about 812 MB per worker: process 300, weights 55, ...`, the largest first."""
    sizes = {**vars(prediction), "heap_bytes": prediction.heap_bytes}
    parts = {name[:-6]: size for name, size in sizes.items() if name.endswith("_bytes") and size >= 5e5}
    told = sorted(parts.items(), key=lambda item: -item[1])
    return f"about {_words(prediction.total_bytes)} per worker: " + ", ".join(
        f"{name} {_words(value)}" for name, value in told
    )


def advise(prediction: MemoryPrediction, limit_bytes: int, config: TrainingConfig) -> str | None:
    """The smallest change of settings with which a worker fits into limit_bytes; None where it fits as it is."""
    if prediction.total_bytes <= limit_bytes:
        return None
    least = prediction.total_bytes
    for changes, changed in _smaller(config, prediction.num_workers):
        again = predict(
            changed, prediction.vocab_size, prediction.num_workers, prediction.device, prediction.process_bytes
        )
        if again.total_bytes <= limit_bytes:
            return f"set {' and '.join(changes)}: about {_words(again.total_bytes)} per worker"
        least = min(least, again.total_bytes)
    return f"take workers of {_words(least)} or a smaller model: no batch, layout or length brings this one below that"


def _smaller(config: TrainingConfig, num_workers: int) -> Iterator[tuple[list[str], TrainingConfig]]:
    """Changes of settings in the order in which they are to be preferred, each with the settings it leads to.

    Fewer sequences at once cost least, activations computed again a third of the speed, shards traffic, and shorter
    sequences change what is learned.
    """
    length, halvings = config.model.max_seq_len, 0
    while length >> halvings >= 64:
        for sharded in (False, True) if num_workers > 1 else (False,):
            for again in (False, True):
                for divisor in (1, 2, 4, 8, 16, 32, 64):
                    changed = _changed(config, num_workers, length >> halvings, sharded, again, divisor)
                    if changed is not None:
                        yield changed
        halvings += 1


def _changed(
    config: TrainingConfig, num_workers: int, length: int, sharded: bool, again: bool, divisor: int
) -> tuple[list[str], TrainingConfig] | None:
    """None where a change changes nothing or does not go with the others."""
    changes: list[str] = []
    update: dict[str, Any] = {}
    micro = min(config.microbatch_size, config.global_batch_size)
    if divisor > 1:
        if micro % divisor:
            return None
        update["microbatch_size"] = micro // divisor
        changes.append(f"train.microbatch_size to {micro // divisor}")
    if again:
        if config.activation_checkpointing:
            return None
        update["activation_checkpointing"] = True
        changes.append("train.activation_checkpointing to true")
    if sharded:
        if config.layout.data != "ddp":
            return None
        update["layout"] = config.layout.model_copy(update={"data": "fsdp"})
        changes.append("train.layout.data to fsdp")
    if length < config.model.max_seq_len:
        update["model"] = config.model.model_copy(update={"max_seq_len": length})
        changes.append(f"train.model.max_seq_len to {length}")
    if not changes:
        return None
    changed = config.model_copy(update=update)
    try:
        changed.check_layout(num_workers)
    except UsageError:
        return None
    return changes, changed


def _words(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
