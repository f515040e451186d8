"""A model on disk: `model.safetensors` and `config.json` in Hugging Face's layout, `tokenizer.json` beside them.

Weights of any floating type are read, whole or in shards, and come as float32. Names and shapes in memory are Llama's;
only gpt2 is stored otherwise: its matrices lie (inputs, outputs), and those of q, k and v are one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, SHARDS, WEIGHTS, read_model_config, write_config
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
    stored = _read_stored(folder)
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
        raise ArtifactError(
            f"{path} is damaged", why=str(error), fix="delete its folder and run the job again"
        ) from None
    return tensors


def _read_stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of the one file, or of every shard that the index names."""
    if (folder / WEIGHTS).exists() or not (folder / SHARDS).exists():
        return read_tensors(folder / WEIGHTS)
    try:
        shards = sorted(set(json.loads((folder / SHARDS).read_text(encoding="utf-8"))["weight_map"].values()))
        assert all(isinstance(name, str) and Path(name).name == name for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        why = "it must map tensors to file names beside it"
        raise ArtifactError(f"{folder / SHARDS} is damaged", why=why, fix="name a complete checkpoint") from None
    return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}


def _mismatch(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint")


def _gpt2_rows(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(stored name, our names whose rows it holds one after the other, whether it is transposed)."""
    yield "wte.weight", (_EMBEDDING,), False
    yield "wpe.weight", ("model.embed_positions.weight",), False
    for kind in ("weight", "bias"):
        yield f"ln_f.{kind}", (f"model.norm.{kind}",), False
        for number in range(config.num_layers):
            ours = f"model.layers.{number}"
            qkv = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
            matrix = kind == "weight"
            yield f"h.{number}.ln_1.{kind}", (f"{ours}.input_layernorm.{kind}",), False
            yield f"h.{number}.ln_2.{kind}", (f"{ours}.post_attention_layernorm.{kind}",), False
            yield f"h.{number}.attn.c_attn.{kind}", qkv, matrix
            yield f"h.{number}.attn.c_proj.{kind}", (f"{ours}.self_attn.o_proj.{kind}",), matrix
            yield f"h.{number}.mlp.c_fc.{kind}", (f"{ours}.mlp.up_proj.{kind}",), matrix
            yield f"h.{number}.mlp.c_proj.{kind}", (f"{ours}.mlp.down_proj.{kind}",), matrix


def _gpt2_out(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {_HEAD: weights[_HEAD]} if _HEAD in weights else {}
    for theirs, ours, transposed in _gpt2_rows(config):
        joined = torch.cat([weights[name] for name in ours])
        stored[f"transformer.{theirs}"] = joined.t() if transposed else joined
    return stored


def _gpt2_in(config: ModelConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """KeyError with the stored name that is missing. Old files have no prefix, and masks among the weights."""
    rest = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    weights = {}
    for theirs, ours, transposed in _gpt2_rows(config):
        joined = rest.pop(theirs)
        parts = (joined.t() if transposed else joined).chunk(len(ours))
        weights.update({name: part.contiguous() for name, part in zip(ours, parts, strict=False)})
    masks = (".attn.bias", ".attn.masked_bias")
    return {**weights, **{name: tensor for name, tensor in rest.items() if not name.endswith(masks)}}
