"""Every layout but plain ddp, and their combinations: one composition over one grid of workers.

A model is split by tensor (parallel/tensor.py), cut into stages (pipeline.py), made to hold a slice of each sequence
(context.py) and sharded (sharded.py), in this order, each only where its axis is longer than 1. What is left to do here:
microbatches run through it, gradients become those of the whole step, and tensors are gathered and placed.

A worker reads an even share of the step's microbatches. Losses are divided by the targets of the whole step, so gradients
are only ever summed: over microbatches by autograd, over `shard` (and hsdp's `copies`) by FSDP, over what is left here.

Shapes: B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymill.dataset.loader import Batch
from raymill.model.transformer import Attention, Transformer
from raymill.training.config import TrainingConfig
from raymill.training.losses import next_token
from raymill.training.parallel.mesh import Grid
from raymill.training.parallel.microbatch import mixed_precision, seed_dropout
from raymill.training.parallel.pieces import all_reduce, gather_whole, holds_first, local, place_piece
from raymill.training.parallel.reduction import sum_scalars
from raymill.training.parallel.worker import Worker

if TYPE_CHECKING:
    from raymill.training.parallel.pipeline import Pipeline

TOLERANCES = {"fsdp": 1e-6, "hsdp": 1e-6, "tensor": 2e-6, "pipeline": 1e-6, "context": 1e-6, "bf16": 2e-3}
"""Of the loss in nats over the first steps, by what a layout has; sums in another order, no more. Measured on 2-4 gloo
processes in fp32 (tests/training/parallel); differences grow with the steps as those of any change of rounding do."""

TIED = "model.embed_tokens.weight"


class Piece(nn.Module):
    """What one worker runs of a model: ids or hidden states in, hidden states or the summed loss of its part out."""

    def __init__(self, model: Transformer, grid: Grid, config: TrainingConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._grid = grid
        self._config = config
        self._device = device
        self._next_microbatch = (0, 0)

    def begin(self, step: int, first_microbatch: int) -> None:
        """The next forward passes are those of `step`, from this microbatch on."""
        self._next_microbatch = (step, first_microbatch)

    def forward(self, x: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """x: the ids of whole sequences on the first stage, the hidden states of the stage before on the others."""
        self._seed_dropout()
        if self._grid.layout.data != "ddp":  # FSDP's own policy says what runs in bf16
            return self._run(x, targets_BT, documents_BT)
        with mixed_precision(self._config, self._device):
            return self._run(x, targets_BT, documents_BT)

    def _run(self, x: Tensor, targets_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        grid = self._grid
        length = targets_BT.shape[1] // grid.layout.context
        first = grid.context_rank * length
        if documents_BT is not None:
            documents_BT = documents_BT[:, : first + length]
        own = slice(0, length)
        if grid.layout.tensor > 1:
            from raymill.training.parallel.tensor import KeepOwnGradient, TakeOwn, own_positions

            own = own_positions(length, grid.group("tensor"))
        if grid.is_first_stage:
            x = self.model.embed(x[:, first : first + length], documents_BT, first)
            if grid.layout.tensor > 1:
                x = KeepOwnGradient.apply(x, own)
        x = self.model.run_blocks(x, documents_BT, first)
        if grid.is_last_stage:
            if grid.layout.tensor > 1:
                x = TakeOwn.apply(x, own, grid.group("tensor"))
            x = self.model.finish(
                x, next_token(targets_BT[:, first + own.start : first + own.stop].contiguous())
            ).float()
        return x

    def _seed_dropout(self) -> None:
        """One worker's draws on the first stage and slice; tensor workers draw alike, as they hold the same activations."""
        step, number = self._next_microbatch
        self._next_microbatch = (step, number + 1)
        if self._config.model.dropout:
            place = self._grid.at("pipeline") * self._grid.layout.context + self._grid.context_rank
            seed_dropout(self._config.seed, step, number + self._config.num_microbatches * place)


class Composed:
    """A Placement of fsdp, hsdp, tensor, pipeline and context, alone or together, and of ddp with the last three."""

    def __init__(self, model: Transformer, worker: Worker, config: TrainingConfig) -> None:
        """Every worker brings the whole model, with the same bits, on its device; it is split in place."""
        self.model: nn.Module = model
        self._transformer = model
        self.tolerance = tolerance(config, worker.device)
        self._config = config
        self._worker = worker
        self._grid = grid = Grid.over(config.layout, worker)
        self._piece = Piece(model, grid, config, worker.device)
        self._pipeline: Pipeline | None = None
        self._split()

    def _split(self) -> None:
        model, grid, layout = self._transformer, self._grid, self._config.layout
        if layout.tensor > 1:
            from raymill.training.parallel.tensor import split_block

            for block in model.model.layers:
                split_block(block, grid.mesh["tensor"])
        if layout.pipeline > 1:
            from raymill.training.parallel.pipeline import keep_stage

            keep_stage(model, grid)
        if grid.context_group is not None:
            from raymill.training.parallel.context import GatheredAttention

            for block in model.model.layers:
                cast(Attention, block.self_attn).attend = GatheredAttention(grid.context_group)
        if layout.data != "ddp":
            from raymill.training.parallel.sharded import shard

            shard(self._piece, list(model.model.layers), grid, self._half)

    @property
    def _half(self) -> bool:
        return isinstance(mixed_precision(self._config, self._worker.device), torch.autocast)

    def microbatches(self) -> range:
        share = self._config.num_microbatches // self._grid.num_readers
        return range(self._grid.reader * share, (self._grid.reader + 1) * share)

    def backward(self, batches: Iterator[Batch], learned: int, step: int) -> Tensor:
        self._piece.begin(step, self.microbatches().start)
        run = self._run_alone if self._config.layout.pipeline == 1 else self._run_pipeline
        losses = run(batches, max(1, learned))
        self._sum_gradients()
        every = torch.zeros(self._config.num_microbatches, device=self._worker.device)
        if losses:
            every[self.microbatches().start : self.microbatches().stop] = torch.stack(losses)
        return sum_scalars(self._over_all_workers(every))

    def _run_alone(self, batches: Iterator[Batch], learned: int) -> list[Tensor]:
        """Every microbatch forward and backward; their losses."""
        losses = []
        last = len(self.microbatches()) - 1
        for index, batch in zip(range(last + 1), batches, strict=False):
            if self._config.layout.data != "ddp":
                from raymill.training.parallel.sharded import reduce_at_the_end

                reduce_at_the_end(self._piece, index == last)
            ids_BT, targets_BT, documents_BT = self._tensors([batch])
            loss = self._piece(ids_BT, targets_BT, documents_BT) / learned
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _run_pipeline(self, batches: Iterator[Batch], learned: int) -> list[Tensor]:
        """The same for stages: losses on the last only."""
        from raymill.training.parallel.pipeline import Pipeline

        count = len(self.microbatches())
        ids_BT, targets_BT, documents_BT = self._tensors([next(batches) for _ in range(count)])
        if self._pipeline is None:
            rows, length = ids_BT.shape[0] // count, ids_BT.shape[1]
            hidden = (rows, length // self._config.layout.context, self._config.model.model_dim)
            half = self._half and self._config.layout.data != "ddp"  # autocast leaves the residual stream in fp32
            dtype = torch.bfloat16 if half else torch.float32
            self._pipeline = Pipeline(self._piece, self._grid, (rows, length), hidden, dtype, count)
        return self._pipeline.run(ids_BT, targets_BT, documents_BT, learned)

    def _tensors(self, batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, targets and documents of some microbatches, one after the other, on this worker's device."""
        device = self._worker.device
        ids_BT = torch.cat([batch.inputs_BT for batch in batches]).to(device)
        targets_BT = torch.cat([batch.targets_BT for batch in batches]).to(device)
        if not self._config.mask_documents:
            return ids_BT, targets_BT, None
        return ids_BT, targets_BT, torch.cat([batch.documents_BT for batch in batches]).to(device)

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """Over the workers that neither autograd nor FSDP has summed: parts, the tied matrix, copies."""
        grid, layout = self._grid, self._config.layout
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.grad is not None]
        if layout.tensor > 1:
            from raymill.training.parallel.tensor import sees_a_part

            parts = [parameter for name, parameter in named if sees_a_part(name)]
            all_reduce([local(parameter.grad) for parameter in parts], grid.group("tensor"))
        if layout.pipeline > 1 and self._config.model.tie_embeddings and (grid.is_first_stage or grid.is_last_stage):
            from raymill.training.parallel.pipeline import sum_tied

            sum_tied(local(self._transformer.model.embed_tokens.weight.grad), grid)
        if layout.data == "ddp" and grid.size("copies") > 1:
            all_reduce([local(parameter.grad) for _, parameter in named], grid.group("copies"))

    def gradient_norm(self) -> Tensor:
        return self._over_all_workers(self._own_squares()).sqrt().float()

    @torch.no_grad()
    def _own_squares(self) -> Tensor:
        """The sum of squares of the gradients that this worker answers for: every number of the model's has one worker."""
        total = torch.zeros((), dtype=torch.float64, device=self._worker.device)
        for name, parameter in self.model.named_parameters():
            twin = name == TIED and self._grid.is_last_stage and not self._grid.is_first_stage
            if (
                parameter.grad is not None
                and holds_first(parameter, self._grid)
                and not (twin and self._config.model.tie_embeddings)
            ):
                total += torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64).square()
        return total

    def _over_all_workers(self, own: Tensor) -> Tensor:
        """The sum of a small tensor over all workers, in their order: the same bits on each."""
        values = [torch.empty_like(own) for _ in range(self._worker.world_size)]
        dist.all_gather(values, own)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return gather_whole(tensors, self._grid)

    def place(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        return place_piece(whole, like)


def tolerance(config: TrainingConfig, device: torch.device) -> float:
    """What the layout's parts add up to."""
    layout = config.layout
    used = [layout.data] + [axis for axis in ("tensor", "pipeline", "context") if getattr(layout, axis) > 1]
    half = isinstance(mixed_precision(config, device), torch.autocast)
    return sum(TOLERANCES.get(part, 0.0) for part in used) + (TOLERANCES["bf16"] if half else 0.0)
