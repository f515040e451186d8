"""A model on disk: `model.safetensors` and `config.json` in Hugging Face's layout, `tokenizer.json` beside them.

Weights of any floating type are read, whole or in shards, and come as float32. Names and shapes in memory are Llama's;
only gpt2 is stored otherwise: its matrices lie (inputs, outputs), and those of q, k and v are one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.files import ANEW, CONFIG, SHARDS, WEIGHTS, read_model_config, write_config
from raymill.model.gpt2_layout import gpt2_rows
from raymill.model.tensor_file import shard_names
from raymill.model.transformer import Transformer

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_model(folder: Path, model: Transformer, end_id: int) -> None:
    """Writes weights and config; a tied head is not stored twice."""
    write_weights(folder, model.config, dict(model.named_parameters()))
    write_config(folder, model.config.to_hugging_face(model.vocab_size, end_id))


def write_weights(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes whole tensors by parameter name."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in stored_weights(config, weights).items()}
    save_tensors(folder / WEIGHTS, tensors)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file. OSError when the machine refuses; the library has its number in a text alone."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        refused = re.search(r"\(os error (\d+)\)", str(error))
        if refused is None:
            raise
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from None


def stored_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by parameter name -> as the file names and shapes them, without a tied head. Copies only gpt2's."""
    whole = {name: tensor.detach() for name, tensor in weights.items()}
    if config.tie_embeddings:
        whole.pop(_HEAD, None)
    return _gpt2_out(config, whole) if config.architecture == "gpt2" else whole


def load_model(folder: Path) -> Transformer:
    """Reads a full-precision model; ArtifactError when weights and config do not belong together."""
    config, vocab_size = read_model_config(folder)
    weights = read_weights(folder, config, vocab_size)
    model = Transformer(config, vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))  # not the tensor read: products may depend on how memory is aligned
    return model


def read_weights(folder: Path, config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Every parameter of that model by name, float32, whole. ArtifactError names the first that does not fit."""
    stored = read_stored(folder)
    try:
        found = _gpt2_in(config, stored) if config.architecture == "gpt2" else stored
    except KeyError as error:
        raise _mismatch(folder, f"there is no {error.args[0]}") from None
    with torch.device("meta"):
        wanted = dict(Transformer(config, vocab_size).named_parameters())
    if config.tie_embeddings:
        found.pop(_HEAD, None)  # some store it all the same
    for name, parameter in wanted.items():
        if name not in found:
            raise _mismatch(folder, f"there is no {name}")
        if found[name].shape != parameter.shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(parameter.shape)}"
            raise _mismatch(folder, f"{name} is {shapes}")
        if not found[name].is_floating_point():
            raise _mismatch(folder, f"{name} is {found[name].dtype}, not a floating type")
    unknown = next((name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")), None)
    if unknown is not None:
        raise _mismatch(folder, f"{unknown} is no part of {config.architecture}")
    return {name: found[name].float() for name in wanted}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors by name."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="name a complete checkpoint") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged", why=str(error), fix=ANEW) from None
    return tensors


def read_stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of the one file, or of every shard that the index names."""
    if (folder / WEIGHTS).exists() or not (folder / SHARDS).exists():
        return read_tensors(folder / WEIGHTS)
    return {name: tensor for shard in shard_names(folder) for name, tensor in read_tensors(folder / shard).items()}


def _mismatch(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint")


def _gpt2_out(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {_HEAD: weights[_HEAD]} if _HEAD in weights else {}
    for theirs, ours, transposed in gpt2_rows(config):
        joined = torch.cat([weights[name] for name in ours])
        stored[f"transformer.{theirs}"] = joined.t() if transposed else joined
    return stored


def _gpt2_in(config: ModelConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """KeyError with the stored name that is missing. Old files have no prefix, and masks among the weights."""
    rest = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    weights = {}
    for theirs, ours, transposed in gpt2_rows(config):
        joined = rest.pop(theirs)
        parts = (joined.t() if transposed else joined).chunk(len(ours))
        weights.update({name: part.contiguous() for name, part in zip(ours, parts, strict=False)})
    masks = (".attn.bias", ".attn.masked_bias")
    return {**weights, **{name: tensor for name, tensor in rest.items() if not name.endswith(masks)}}
