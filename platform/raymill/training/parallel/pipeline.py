"""Pipeline parallelism: each stage holds a run of blocks and sends its hidden states on, one forward, one backward (1F1B;
Narayanan et al. 2019, PipeDream-Flush) by torch's pipelining.

The first stage holds the embeddings, the last the final norm and the head. A tied embedding lies on both: each adds the
gradient of its own use, the two are summed once per step, and both make the same update. Ids, targets and documents are
read by every stage; only hidden states and their gradients travel, (B, T, D) each. A stage waits for (stages - 1) of
(microbatches + stages - 1) turns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from raymill.model.transformer import Transformer
from raymill.training.parallel.mesh import Grid


def keep_stage(model: Transformer, grid: Grid) -> None:
    """Drops, in place, what other stages hold; the names of what stays are the whole model's."""
    share = model.config.num_layers // grid.layout.pipeline
    first = grid.at("pipeline") * share
    for index in range(model.config.num_layers):
        if not first <= index < first + share:
            delattr(model.model.layers, str(index))
    tied_here = model.config.tie_embeddings and grid.is_last_stage
    if not grid.is_first_stage:
        model.model.embed_positions = None
        if not tied_here:
            del model.model.embed_tokens
    if not grid.is_last_stage:
        del model.model.norm, model.lm_head


class Pipeline:
    """The schedule of one worker's stage. All microbatches have the same shape."""

    def __init__(
        self,
        piece: nn.Module,
        grid: Grid,
        ids: tuple[int, int],
        hidden: tuple[int, int, int],
        dtype: torch.dtype,
        num_microbatches: int,
    ) -> None:
        """ids: B, T of a microbatch; hidden: B, T, D of what travels; dtype: its type."""
        device = torch.device(grid.mesh.device_type)
        travels = torch.empty(hidden, dtype=dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            piece,
            grid.at("pipeline"),
            grid.layout.pipeline,
            device,
            input_args=torch.empty(ids, dtype=torch.int64, device="meta") if grid.is_first_stage else travels,
            output_args=torch.empty((), device="meta", requires_grad=True) if grid.is_last_stage else travels,
            group=grid.group("pipeline"),
        )
        self._grid = grid
        self._learned = 1
        self._schedule = Schedule1F1B(
            stage, num_microbatches, loss_fn=lambda total, _: total / self._learned, scale_grads=False
        )

    def run(self, ids_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None, learned: int) -> list[Tensor]:
        """All microbatches, one after the other in B, forward and backward; the last stage's losses by microbatch."""
        self._learned = learned
        losses: list[Tensor] = []
        first = (ids_BT,) if self._grid.is_first_stage else ()
        documents: dict[str, Any] = {} if documents_BT is None else {"documents_BT": documents_BT}
        self._schedule.step(
            *first, targets_BT=targets_BT, **documents, target=targets_BT, losses=losses, return_outputs=False
        )
        return [loss.detach() for loss in losses]


def sum_tied(gradient: Tensor, grid: Grid) -> None:
    """Adds the tied matrix's two gradients, in place on the first and the last stage, with the same bits."""
    group, last = grid.group("pipeline"), grid.layout.pipeline - 1
    if grid.is_last_stage:
        dist.send(gradient, group=group, group_dst=0)
        dist.recv(gradient, group=group, group_src=0)
    else:
        other = torch.empty_like(gradient)
        dist.recv(other, group=group, group_src=last)
        dist.send(gradient.add_(other), group=group, group_dst=last)
