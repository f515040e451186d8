"""Whole tensors and the pieces that workers hold of them: gathered for checkpoints, placed when one is read.

A piece is a DTensor where torch split it (FSDP by rows, tensor parallelism by rows or columns), else a plain tensor that
every worker of its stage holds whole. Checkpoints hold whole tensors only, so one written under any layout is read under
any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from raymill.training.parallel.mesh import AXES, Grid

BUCKET_NUMBERS = 8 << 20
"""Numbers summed in one message: 32 MiB in fp32."""


def local(tensor: Tensor | None) -> Tensor:
    """This worker's numbers of a tensor that exists, sharing its memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors of one type over a group, in place, in messages of about 32 MiB."""
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index + 1 < len(tensors) and sum(each.numel() for each in bucket) < BUCKET_NUMBERS:
            continue
        flat = torch.cat([each.reshape(-1) for each in bucket])
        dist.all_reduce(flat, group=group)
        for each, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(summed.view_as(each))
        bucket = []


def holds_first(tensor: Tensor, grid: Grid) -> bool:
    """Whether this worker is the first, along every axis that does not split the tensor, of those with the same numbers."""
    split = set()
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names or ()
        split = {name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate()}
    return all(grid.at(axis) == 0 for axis in AXES if axis != "pipeline" and axis not in split)


@torch.no_grad()
def gather_whole(tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Every worker's tensors, whole, by name, on rank 0; on others those of their own stage."""
    whole = {name: make_whole(tensor.detach()) for name, tensor in tensors.items()}
    group, stages = grid.group("pipeline"), grid.layout.pipeline
    if stages == 1 or any(grid.at(axis) for axis in AXES if axis != "pipeline"):
        return whole
    held: list[list[tuple[str, torch.Size, torch.dtype]] | None] = [None] * stages
    dist.all_gather_object(held, [(name, tensor.shape, tensor.dtype) for name, tensor in whole.items()], group=group)
    if not grid.is_first_stage:
        for tensor in whole.values():
            dist.send(tensor.contiguous(), group=group, group_dst=0)
        return whole
    for stage in range(1, stages):
        for name, shape, dtype in held[stage] or []:
            tensor = torch.empty(shape, dtype=dtype, device=grid.mesh.device_type)
            dist.recv(tensor, group=group, group_src=stage)
            whole.setdefault(name, tensor)
    return whole


@torch.no_grad()
def make_whole(tensor: Tensor) -> Tensor:
    """The whole of a piece, on every worker that holds one; undoes place_piece."""
    if not isinstance(tensor, DTensor):
        return tensor
    piece, shape = tensor.to_local(), tensor.shape
    splits, shapes = _splits(tensor), []
    for _, dim, size in splits:
        shapes.append(shape)
        shape = torch.Size([-(-n // size) if at == dim else n for at, n in enumerate(shape)])
    for (axis, dim, _), shape in zip(reversed(splits), reversed(shapes), strict=True):
        stride = torch.empty(shape, device="meta").stride()
        mesh = tensor.device_mesh[axis]
        piece = DTensor.from_local(piece, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride).full_tensor()
    return piece


@torch.no_grad()
def place_piece(whole: Tensor, like: Tensor) -> Tensor:
    """This worker's piece of a whole tensor, laid out as `like`; tensors of another shape are every worker's own."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.to(like.device)
    mesh, piece = like.device_mesh, whole
    for axis, dim, size in _splits(like):
        parts, at = piece.chunk(size, dim), mesh.get_local_rank(axis)
        piece = parts[at] if at < len(parts) else piece.narrow(dim, 0, 0)
    piece = piece.to(like.device).contiguous()
    return DTensor.from_local(
        piece, mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def _splits(tensor: DTensor) -> list[tuple[str, int, int]]:
    """Axis, dimension and number of pieces of each split, in order: tensor parallelism first, then FSDP what is left."""
    mesh = tensor.device_mesh
    splits = []
    for axis, placement in zip(mesh.mesh_dim_names or (), tensor.placements, strict=True):
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]
            splits.append((axis, dim, mesh[axis].size()))
    return splits[::-1]
