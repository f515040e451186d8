"""The layout that train.layout names, and what is done to a model before any layout holds it."""

from __future__ import annotations

from raymill.errors import UsageError
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.parallel.placement import Placement
from raymill.training.parallel.worker import Worker


def placement_for(config: TrainingConfig, model: Transformer, worker: Worker) -> Placement:
    """The placement of a whole model, the same bits on every worker; the model is changed in place.

    UsageError where layout, precision and device do not go together. Every worker calls it at the same time.
    """
    check_placement(config, worker)
    model.to(worker.device)
    model.checkpoint_activations = config.activation_checkpointing
    if config.compile:
        for block in model.model.layers:
            block.compile()
    if config.layout.data == "ddp" and config.layout.model_size == 1:
        from raymill.training.parallel.replicated import Replicated

        return Replicated(model, worker, config)
    from raymill.training.parallel.composed import Composed  # FSDP, DTensor and pipelining take a second to import

    return Composed(model, worker, config)


def check_placement(config: TrainingConfig, worker: Worker) -> None:
    """UsageError unless these workers can hold the layout."""
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
