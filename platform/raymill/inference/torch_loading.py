"""A checkpoint folder to the torch step on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from raymill.compression.format import QUANTIZATION
from raymill.compression.quantize import load_served_model
from raymill.errors import MachineError
from raymill.inference.kv_cache import KvPrecision
from raymill.inference.torch_step import TorchStep
from raymill.model.files import read_config
from raymill.model.transformer import Transformer

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
    model = load_served_model(checkpoint)
    if device == "cuda":  # on a CPU fp32 is quicker
        _halve(model, read_config(checkpoint))
    return TorchStep(model.to(device), num_pages, kv_precision)


def _halve(model: Transformer, values: dict[str, Any]) -> None:
    """To the type of its weights. Not what is quantized, whose scales are fp32, and not the rotary tables: turning by
    cosines of 8 bits would move far positions."""
    half = _HALVES.get(str(values.get("torch_dtype")))
    if half is not None and QUANTIZATION not in values:
        tables = model.cos_TC, model.sin_TC
        model.to(half)
        model.cos_TC, model.sin_TC = tables
