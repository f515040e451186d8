"""A quantized checkpoint as vLLM and transformers read it: the compressed-tensors format inside a Hugging Face folder.

In: an int8 or int4 checkpoint. Out: int8 as `int-quantized`, W8A8: the same integers and scales per output channel,
activations quantized per token as they come, as ours are. int4 as `pack-quantized`, W4A16: the same integers, eight to an
int32, and scales per group; activations are not quantized there, where ours are int8. Embedding and head are widened:
neither reader multiplies quantized ones. gpt2 has no form there, as its matrices are no linear layers to transformers.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymill.export.hugging_face import DTYPES, NOTE, write_beside_weights
from raymill.export.source import Quantized, Source
from raymill.model.files import WEIGHTS
from raymill.model.weights import save_tensors

_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_PER_WORD = 8
"""4-bit values in an int32, the first in the lowest bits."""


def write(source: Source, folder: Path, precision: str) -> list[str]:
    """Writes the model folder; `precision` is of what is not quantized."""
    dtype = DTYPES[precision]
    tensors: dict[str, Tensor] = {}
    group_size = 0
    for name, weight in source.weights.items():
        if not isinstance(weight, Quantized) or name in _OUTER:
            tensors[name] = source.full(name).to(dtype)
            continue
        group_size = weight.group_size
        tensors.update(_store(name.removesuffix(".weight"), weight, dtype))
    save_tensors(folder / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    settings = {"quantization_config": _describe(source.method, group_size)}
    write_beside_weights(source, folder, dtype, settings)
    if source.method == "int8":
        return [NOTE]
    return [NOTE, "activations are not quantized by those who read it (W4A16); ours are int8 (W4A8)"]


def _store(stem: str, weight: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    if weight.bits == 8:  # scales stay fp32: in bf16 each would be off by up to 0.2 %
        return {f"{stem}.weight": weight.values_NK, f"{stem}.weight_scale": weight.scale_NG}
    return {
        f"{stem}.weight_packed": _pack(weight.values_NK),
        f"{stem}.weight_scale": weight.scale_NG.to(dtype),
        f"{stem}.weight_shape": torch.tensor(weight.values_NK.shape, dtype=torch.int64),
    }


def _pack(values_NK: Tensor) -> Tensor:
    """int32 (N, K / 8), of values + 8."""
    stored = (values_NK.numpy() + 8).astype(np.uint32).reshape(len(values_NK), -1, _PER_WORD)
    words = np.bitwise_or.reduce(stored << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return torch.from_numpy(words.view(np.int32))


def _describe(method: str, group_size: int) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    if method == "int8":
        weights = {**eight_bits, "strategy": "channel", "dynamic": False}
        activations = {**eight_bits, "strategy": "token", "dynamic": True}
    else:
        weights = {**eight_bits, "num_bits": 4, "strategy": "group", "group_size": group_size, "dynamic": False}
        activations = None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if method == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
