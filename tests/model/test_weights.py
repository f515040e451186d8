"""Weights that are not what config.json says are refused in one message; old and sharded files are read."""

from __future__ import annotations

import errno
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model, read_weights, save_model, save_tensors

LLAMA = ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=16)
GPT2 = ModelConfig(
    num_layers=2, model_dim=32, num_heads=4, num_kv_heads=4, hidden_dim=48, max_seq_len=16, architecture="gpt2"
)
Tensors = dict[str, Tensor]


def save(folder: Path, config: ModelConfig = LLAMA) -> Transformer:
    model = Transformer(config, 50)
    model.initialize(0)
    save_model(folder, model, end_id=0)
    return model


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def same(one: Transformer, other: Transformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "change", "why"),
    [
        (LLAMA, lambda t: t.pop("model.norm.weight"), "there is no model.norm.weight"),
        (LLAMA, lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(3,\), not \(32,\)"),
        (LLAMA, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), ".*not a floating type"),
        (
            LLAMA,
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "model.layers.0.self_attn.q_proj.bias is no part of llama",
        ),
        (GPT2, lambda t: t.pop("transformer.h.1.attn.c_attn.weight"), "there is no h.1.attn.c_attn.weight"),
        (
            GPT2,
            lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.ones(48, 32)}),
            r"model.layers.1.mlp.up_proj.weight is \(32, 48\), not \(48, 32\)",
        ),
        (GPT2, lambda t: t.update({"transformer.h.0.attn.c_attn.bias": torch.ones(2)}), "there is no|is \\("),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, config: ModelConfig, change: Callable[[Tensors], object], why: str
) -> None:
    save(tmp_path, config)
    rewrite(tmp_path, change)
    with pytest.raises(ArtifactError, match=f"does not match config.json\n  why: {why}"):
        load_model(tmp_path)


HEADER = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 10**12]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 4) + b"[[[[",
        struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 128,
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"F32", b"X99"),
    ],
    ids=["empty", "length of 2^64", "length past the end", "no JSON", "lying offsets", "unknown type"],
)
def test_a_lying_header_is_one_message(tmp_path: Path, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_cut_file_is_one_message(tmp_path: Path, keep: float) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


def test_gpt2_files_of_old_are_read(tmp_path: Path) -> None:
    model = save(tmp_path, GPT2)

    def age(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(tmp_path, age)
    assert same(load_model(tmp_path), model)


def shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{1 + (number > 5):05d}-of-00002.safetensors" for number, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))
    weights = read_weights(tmp_path, LLAMA, 50)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight.bfloat16().float())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_shards_are_one_model(tmp_path: Path, config: ModelConfig) -> None:
    model = save(tmp_path, config)
    shard(tmp_path)
    assert same(load_model(tmp_path), model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is damaged"),
        ("{}", "index.json is damaged"),
        ('{"weight_map": []}', "index.json is damaged"),
        ('{"weight_map": {"a": 3}}', "index.json is damaged"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "index.json is damaged"),
        ('{"weight_map": {"a": "absent.safetensors"}}', r"absent\.safetensors is missing"),
    ],
)
def test_an_index_that_lies_is_one_message(tmp_path: Path, index: str, message: str) -> None:
    save(tmp_path)
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match=message):
        load_model(tmp_path)


def test_a_disk_that_takes_no_more_is_told_with_the_file(tmp_path: Path) -> None:
    _, most_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most_bytes))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "model.safetensors")
