"""A checkpoint folder to the torch step on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from raymill.compression.quantize import load_served_model
from raymill.errors import MachineError
from raymill.inference.kv_cache import KvPrecision
from raymill.inference.torch_step import TorchStep
from raymill.model.files import read_config

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of weights, as config.json names them, that a GPU computes in."""


def load_torch_step(
    checkpoint: Path, device: Literal["cpu", "cuda"], num_pages: int, kv_precision: KvPrecision, threads: int
) -> TorchStep:
    """MachineError when `device` is not there. On "cpu" nothing touches CUDA."""
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        why = "this torch has no CUDA, or the worker sees no GPU"
        raise MachineError("a replica finds no GPU", why=why, fix="set cluster.roles.serve.gpus_per_worker to 0")
    model = load_served_model(checkpoint).to(device)
    half = _HALVES.get(str(read_config(checkpoint).get("torch_dtype")))
    if device == "cuda" and half is not None:  # on a CPU fp32 is quicker
        model.to(half)
    return TorchStep(model, num_pages, kv_precision)
