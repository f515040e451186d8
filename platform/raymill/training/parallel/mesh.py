"""Where a worker stands: the axes along which a model and its batches lie over the workers of a run.

    rank = ((pipeline * copies + copy) * shard + piece) * tensor + part

`copies` hold the same weights, `shard` workers hold one copy in pieces (FSDP), `tensor` workers hold parts of each matrix
and talk most, so they are neighbours; `pipeline` stages talk least. Context workers are no axis of the weights: to them,
they are workers with other data. Along the data axis (copies x shard) neighbours share sequences, `context` of them each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from raymill.training.config import LayoutConfig

if TYPE_CHECKING:
    from raymill.training.parallel.worker import Worker

AXES = ("pipeline", "copies", "shard", "tensor")


@dataclass(frozen=True)
class Grid:
    """One worker's coordinates among all; every worker makes it at the same time."""

    layout: LayoutConfig
    mesh: DeviceMesh
    """AXES, sizes of 1 included."""
    context_group: dist.ProcessGroup | None
    """The workers that share this one's sequences; none when context is 1."""

    @classmethod
    def over(cls, layout: LayoutConfig, worker: Worker) -> Grid:
        """The grid of a layout over all workers; TrainingConfig.check_layout has seen that it divides."""
        inner = layout.tensor * layout.pipeline
        data = worker.world_size // inner
        shard = {"ddp": 1, "fsdp": data, "hsdp": (layout.shard or 1) * layout.context}[layout.data]
        shape = (layout.pipeline, data // shard, shard, layout.tensor)
        mesh = init_device_mesh(worker.device.type, shape, mesh_dim_names=AXES)
        group = None
        if layout.context > 1:
            shape = (layout.pipeline, data // layout.context, layout.context, layout.tensor)
            names = ("pipeline", "data", "context", "tensor")
            group = init_device_mesh(worker.device.type, shape, mesh_dim_names=names).get_group("context")
        return cls(layout, mesh, group)

    def at(self, axis: str) -> int:
        """This worker's place along one of AXES."""
        return self.mesh.get_local_rank(axis)

    def size(self, axis: str) -> int:
        return self.mesh[axis].size()

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.mesh.get_group(axis)

    @property
    def _data_rank(self) -> int:
        return self.at("copies") * self.size("shard") + self.at("shard")

    @property
    def num_readers(self) -> int:
        """Groups of workers with sequences of their own."""
        return self.size("copies") * self.size("shard") // self.layout.context

    @property
    def reader(self) -> int:
        """This worker's group among them."""
        return self._data_rank // self.layout.context

    @property
    def context_rank(self) -> int:
        """This worker's slice of its sequences."""
        return self._data_rank % self.layout.context

    @property
    def is_first_stage(self) -> bool:
        return self.at("pipeline") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at("pipeline") == self.layout.pipeline - 1
