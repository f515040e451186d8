"""Quantization of a whole model: its matrices replaced by integers, written to disk, and read again.

In: a full-precision Transformer. Out: the same Transformer with the layers of int8.py or int4.py; norms, biases and
learned positions stay fp32. On disk everything has Llama's names; format.py says how. A tied embedding is stored once,
int8: the head multiplies it, a look-up dequantizes rows.

Without calibration every weight is rounded to the nearest integer: seconds for 125 M parameters. With it GPTQ decides, and
a head of its own is smoothed (smooth.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from raymill.compression.calibrate import Calibration, Walk, readers
from raymill.compression.format import HEAD_INPUT_SCALE, QUANTIZATION, Quantization, read_quantization
from raymill.compression.gptq import round_with_moments
from raymill.compression.int4 import HIGHEST, LOWEST, Int4Linear, group_scales, pack, quantize_groups
from raymill.compression.int8 import Int8Embedding, Int8Linear, quantize_rows, row_scales
from raymill.compression.smooth import smooth_head
from raymill.errors import ArtifactError, UsageError
from raymill.model.files import CONFIG, WEIGHTS, read_config, read_model_config, write_config
from raymill.model.linear import Linear
from raymill.model.rope import rotary_tables
from raymill.model.transformer import Block, Transformer
from raymill.model.weights import load_model, read_stored, save_tensors

INT8 = Quantization("int8")


@torch.no_grad()
def quantize_model(
    model: Transformer,
    quantization: Quantization = INT8,
    calibration: Calibration | None = None,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Replaces every matrix of `model` in place. A tied head and embedding keep sharing one matrix.

    `on_layer` is told how many layers of how many are done. UsageError where the matrices do not divide into groups.
    """
    quantization.check_fits(model.config)
    embedding = quantize_rows(model.model.embed_tokens.weight.detach())
    head_VD = model.lm_head.weight.detach()
    _set_ends(model, embedding, embedding if model.config.tie_embeddings else quantize_rows(head_VD))
    walk = None if calibration is None else Walk(model, calibration)
    for number, block in enumerate(cast("list[Block]", model.model.layers)):
        for part, names in readers(block):
            moments = None if walk is None else walk.moments(block, getattr(part, names[0]))
            for name in names:
                setattr(part, name, _quantize_layer(getattr(part, name), quantization, moments))
        if walk is not None:
            walk.advance(block)
        on_layer(number + 1, model.config.num_layers)
    if walk is not None and not model.config.tie_embeddings:
        model.lm_head = cast(Linear, smooth_head(model, head_VD, walk))


def _set_ends(model: Transformer, embedding: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> None:
    model.model.embed_tokens = cast(nn.Embedding, Int8Embedding(*embedding))
    model.lm_head = cast(Linear, Int8Linear(*head))


def _quantize_layer(layer: nn.Linear, quantization: Quantization, moments_KK: Tensor | None) -> nn.Module:
    weight_NK = layer.weight.detach()
    bias_N = None if layer.bias is None else layer.bias.detach()
    if quantization.method == "int8":
        if moments_KK is None:
            return Int8Linear(*quantize_rows(weight_NK), bias_N)
        scale_N1 = row_scales(weight_NK)
        values_NK = round_with_moments(weight_NK, scale_N1.expand_as(weight_NK), moments_KK, -127, 127)
        return Int8Linear(values_NK.to(torch.int8), scale_N1, bias_N)
    size = quantization.group_size
    if moments_KK is None:
        return Int4Linear(*quantize_groups(weight_NK, size), bias_N)
    scale_NJ = group_scales(weight_NK, size, moments_KK.diagonal())
    scale_NK = scale_NJ.float().repeat_interleave(size, dim=1)
    return Int4Linear(pack(round_with_moments(weight_NK, scale_NK, moments_KK, LOWEST, HIGHEST)), scale_NJ, bias_N)


def save_quantized(folder: Path, model: Transformer, end_id: int, quantization: Quantization = INT8) -> None:
    """Writes the weights and config of a quantized model."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    save_tensors(folder / WEIGHTS, tensors)
    config = model.config.to_hugging_face(model.vocab_size, end_id)
    write_config(folder, {**config, QUANTIZATION: quantization.to_json()})


def load_served_model(folder: Path) -> Transformer:
    """Reads a checkpoint of any precision, ready for evaluation; half precision is widened.

    ArtifactError when it is not whole, or names a quantization that is not known.
    """
    quantization = read_quantization(read_config(folder), str(folder / CONFIG))
    if quantization is None:
        return load_model(folder).requires_grad_(False).eval()
    return _load_quantized(folder, quantization)


def _load_quantized(folder: Path, quantization: Quantization) -> Transformer:
    config, vocab_size = read_model_config(folder)
    tensors = read_stored(folder)
    try:
        quantization.check_fits(config)
    except UsageError as error:  # of a checkpoint nobody could have made
        raise _mismatch(folder, error.what) from None
    with torch.device("meta"):  # names, shapes and types only: every tensor comes from the file
        model = Transformer(config, vocab_size).requires_grad_(False).eval()
        _set_empty_layers(model, quantization)
    model.cos_TC, model.sin_TC = rotary_tables(config)
    if config.tie_embeddings:
        of_embedding = {name: tensor for name, tensor in tensors.items() if name.startswith("model.embed_tokens.")}
        tensors.update({name.replace("model.embed_tokens", "lm_head"): each for name, each in of_embedding.items()})
    elif HEAD_INPUT_SCALE in tensors:
        model.lm_head.register_buffer("input_scale", torch.empty(config.model_dim, device="meta"))
    for name, wanted in model.state_dict().items():
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise _mismatch(folder, f"{name} is missing or of another shape or type")
        if name.endswith("_scale") and not bool(torch.isfinite(found).all()):
            raise _mismatch(folder, f"{name} is not finite")
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


def _set_empty_layers(model: Transformer, quantization: Quantization) -> None:
    """The layers of `quantize_model`, with any content."""
    ends = torch.empty(model.vocab_size, model.config.model_dim, dtype=torch.int8), torch.empty(model.vocab_size, 1)
    _set_ends(model, ends, ends)
    size = quantization.group_size
    for block in cast("list[Block]", model.model.layers):
        for part, name in [(part, name) for part, names in readers(block) for name in names]:
            bias, (rows, columns) = getattr(part, name).bias, getattr(part, name).weight.shape
            if quantization.method == "int8":
                scales = torch.empty(rows, 1)
                setattr(part, name, Int8Linear(torch.empty(rows, columns, dtype=torch.int8), scales, bias))
            else:
                scales = torch.empty(rows, columns // size, dtype=torch.float16)
                setattr(part, name, Int4Linear(torch.empty(rows, columns // 2, dtype=torch.uint8), scales, bias))


def _mismatch(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint")
