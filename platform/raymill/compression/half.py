"""fp16 and bf16: the weights in half the size, for GPUs. On a CPU they are widened again as they are read.

Every tensor is cast, and config.json names the type as Hugging Face does (torch_dtype). fp16 keeps 11 bits of a weight up
to 65,504, bf16 8 bits of any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from raymill.errors import QualityError
from raymill.model.files import write_config
from raymill.model.transformer import Transformer
from raymill.model.weights import write_weights

HalfPrecision = Literal["fp16", "bf16"]
_TYPES = {"fp16": ("float16", torch.float16), "bf16": ("bfloat16", torch.bfloat16)}


def save_half(folder: Path, model: Transformer, end_id: int, precision: HalfPrecision) -> None:
    """Writes weights and config. QualityError when a weight is too large for fp16."""
    named, dtype = _TYPES[precision]
    weights = {name: weight.detach().to(dtype) for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise QualityError(
                f"{name} does not fit into {precision}",
                where="compress.method",
                why=f"its largest weight is beyond {torch.finfo(dtype).max:,.0f}",
                fix="set compress.method to bf16, or train again: weights this large are a sign of trouble",
            )
    write_weights(folder, model.config, weights)
    config = model.config.to_hugging_face(model.vocab_size, end_id)
    write_config(folder, {**config, "torch_dtype": named})
