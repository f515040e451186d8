"""The layout that train.layout names, and what is done to a model before any layout holds it."""

from __future__ import annotations

import torch

from raymill.errors import UsageError
from raymill.model.fp8 import CAPABILITY, MULTIPLE, use_fp8
from raymill.model.int8 import supports_int8, use_int8
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.parallel.placement import Placement
from raymill.training.parallel.replicated import Replicated
from raymill.training.parallel.worker import Worker


def placement_for(config: TrainingConfig, model: Transformer, worker: Worker) -> Placement:
    """The placement of a whole model, the same bits on every worker; the model is changed in place.

    UsageError where layout, precision and device do not go together. Every worker calls it at the same time.
    """
    check_placement(config, worker)
    model.to(worker.device)
    model.checkpoint_activations = config.activation_checkpointing
    for block in model.model.layers:
        if config.precision == "int8":
            use_int8(block)
        if config.precision == "fp8":
            use_fp8(block)
        if config.compile:
            block.compile()
    if config.layout.data == "ddp" and config.layout.model_size == 1:
        return Replicated(model, worker, config)
    from raymill.training.parallel.composed import Composed  # FSDP, DTensor and pipelining take a second to import

    return Composed(model, worker, config)


def tolerance_of(config: TrainingConfig, device: torch.device) -> float:
    """What `placement_for` will say of the placement it builds."""
    if config.layout.data == "ddp" and config.layout.model_size == 1:
        return Replicated.tolerance_on(device)
    from raymill.training.parallel.composed import tolerance

    return tolerance(config, device)


def check_placement(config: TrainingConfig, worker: Worker) -> None:
    """UsageError unless these workers can hold the layout and compute in its precision.

    Where there is no GPU here, as for who places the workers, what theirs can do is left to them.
    """
    config.check_layout(worker.world_size)
    layout = config.layout
    readers = worker.world_size // layout.model_size
    share = config.num_microbatches // readers
    if share < layout.pipeline:
        raise UsageError(
            f"{share} microbatches do not fill {layout.pipeline} pipeline stages",
            why="each stage works on another microbatch at the same time",
            fix=f"set train.global_batch_size to a multiple of {readers * layout.pipeline * config.microbatch_size}, "
            "or lower train.microbatch_size",
        )
    if config.precision in ("int8", "fp8") and layout.tensor > 1:
        raise UsageError(
            f"train.precision {config.precision} does not go with train.layout.tensor {layout.tensor}",
            fix="set train.layout.tensor to 1, or leave train.precision out",
        )
    if config.precision == "int8" and config.compile:
        raise UsageError(
            "train.precision int8 does not go with train.compile",
            why="a compiler sees the matrices in fp32 only",
            fix="set train.compile to false, or leave train.precision out",
        )
    if config.precision == "int8" and (worker.device.type != "cpu" or not supports_int8()):
        raise UsageError(
            "train.precision int8 needs a CPU with VNNI",
            why=f"this worker computes on {worker.device}" if worker.device.type != "cpu" else "this one has none",
            fix="leave train.precision out: fp32 on CPUs, bf16 on GPUs",
        )
    if config.precision == "fp8":
        _check_fp8(config, worker.device)


def _check_fp8(config: TrainingConfig, device: torch.device) -> None:
    here = device.type == "cuda" and torch.cuda.is_available()
    if device.type != "cuda" or (here and torch.cuda.get_device_capability(device) < CAPABILITY):
        raise UsageError(
            f"train.precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer",
            why=f"this worker computes on {device}",
            fix="set train.precision to bf16 on other GPUs, to fp32 on CPUs",
        )
    model = config.model
    tokens = min(config.microbatch_size, config.global_batch_size) * model.max_seq_len // config.layout.context
    for name, size in (
        ("train.model.model_dim", model.model_dim),
        ("train.model.hidden_dim", model.hidden_dim),
        ("train.model.num_kv_heads times the width of a head", model.num_kv_heads * model.head_width),
        ("train.microbatch_size times train.model.max_seq_len over train.layout.context", tokens),
    ):
        if size % MULTIPLE:
            raise UsageError(
                f"{name} is {size}, which fp8 cannot multiply",
                fix=f"make it a multiple of {MULTIPLE}, or set train.precision to bf16",
            )
