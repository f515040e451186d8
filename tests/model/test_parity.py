"""Models go to Hugging Face and come from it with the logits they had."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raymill.model.config import ModelConfig, RopeScaling
from raymill.model.hugging_face import config_to_hugging_face
from raymill.model.rope import rotary_tables
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model, save_model

VOCAB = 61
CLOSE = 1e-4
LENGTH = 24

LLAMA = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 32}
GPT2 = {**LLAMA, "architecture": "gpt2", "num_kv_heads": 4}
LLAMA3 = RopeScaling(kind="llama3", factor=8, original_max_seq_len=16, low_freq_factor=1, high_freq_factor=4)
YARN = RopeScaling(kind="yarn", factor=4, original_max_seq_len=8, beta_fast=4, beta_slow=1)

OURS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_embeddings": False},
    "llama tied, every head its keys": {**LLAMA, "num_kv_heads": 4},
    "llama head_dim": {**LLAMA, "head_dim": 16},
    "llama linear rope": {**LLAMA, "rope_scaling": RopeScaling(kind="linear", factor=4)},
    "llama llama3 rope": {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama yarn rope": {**LLAMA, "rope_scaling": YARN},
    "mistral": {**LLAMA, "architecture": "mistral", "tie_embeddings": False},
    "mistral window": {**LLAMA, "architecture": "mistral", "sliding_window": 5, "head_dim": 12},
    "qwen2": {**LLAMA, "architecture": "qwen2", "norm_eps": 1e-6},
    "qwen2 untied window": {**LLAMA, "architecture": "qwen2", "sliding_window": 7, "tie_embeddings": False},
    "qwen3": {**LLAMA, "architecture": "qwen3", "head_dim": 16},
    "qwen3 untied yarn": {**LLAMA, "architecture": "qwen3", "tie_embeddings": False, "rope_scaling": YARN},
    "qwen3 window": {**LLAMA, "architecture": "qwen3", "sliding_window": 4},
    "gpt2": GPT2,
    "gpt2 untied": {**GPT2, "tie_embeddings": False, "hidden_dim": 128},
}

SMALL = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}
SMALL_GPT2 = {
    **{"vocab_size": VOCAB, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32},
    **{"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3},
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama tied, every head its keys": ("Llama", {**SMALL, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama head_dim": ("Llama", {**SMALL, "head_dim": 16}),
    "llama linear rope": ("Llama", {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama llama3 rope": (
        "Llama",
        {
            **SMALL,
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
        },
    ),
    "llama yarn rope": (
        "Llama",
        {
            **SMALL,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
                **{"beta_fast": 4.0, "beta_slow": 1.0},
            },
        },
    ),
    "mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "mistral window": ("Mistral", {**SMALL, "sliding_window": 5, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2 untied window": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 untied yarn": (
        "Qwen3",
        {
            **SMALL,
            "head_dim": 8,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
            },
        },
    ),
    "qwen3 window": (
        "Qwen3",
        {**SMALL, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "gpt2": ("GPT2", SMALL_GPT2),
    "gpt2 untied": ("GPT2", {**SMALL_GPT2, "tie_word_embeddings": False, "n_inner": 48}),
}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.std() > 0.1, "logits that are all alike prove nothing"
    return float((one - other).abs().max())


def their_model(transformers: ModuleType, family: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms that are not 1, biases that are not 0
                if parameter.ndim < 2:
                    parameter.add_(torch.rand(parameter.shape) - 0.5)
    return model


@pytest.mark.parametrize("variant", THEIRS)
def test_their_models_come_in(variant: str, transformers: ModuleType, ids: torch.Tensor, tmp_path: Path) -> None:
    model = their_model(transformers, *THEIRS[variant])
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        difference = largest_difference(model(ids).logits, ours(ids))
    print(f"parity in | {variant} | {difference:.1e}")
    assert difference < CLOSE


@pytest.mark.parametrize("variant", OURS)
def test_our_models_go_out(variant: str, transformers: ModuleType, ids: torch.Tensor, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(**OURS[variant]), VOCAB)
    model.initialize(0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_model(tmp_path, model, end_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        difference = largest_difference(theirs(ids).logits, model(ids))
    print(f"parity out | {variant} | {difference:.1e}")
    assert difference < CLOSE
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="llama3", factor=8, original_max_seq_len=8192),
        RopeScaling(kind="yarn", factor=4, original_max_seq_len=32768),
        RopeScaling(kind="yarn", factor=40, original_max_seq_len=4096, beta_fast=20, beta_slow=2),
    ],
    ids=["llama 3.1", "qwen 2.5", "other ramp"],
)
def test_angles_of_real_sizes_are_theirs(scaling: RopeScaling, transformers: ModuleType) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = ModelConfig(model_dim=512, num_heads=4, rope_theta=5e5, rope_scaling=scaling, max_seq_len=64)
    theirs = transformers.LlamaConfig(**config_to_hugging_face(config, VOCAB, 0))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(64)[None])
    ours = rotary_tables(config)
    torch.testing.assert_close(torch.stack(ours), torch.cat([cos, sin]), rtol=0, atol=1e-5)


def test_shards_are_read(transformers: ModuleType, ids: torch.Tensor, tmp_path: Path) -> None:
    model = their_model(transformers, *THEIRS["llama"])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert largest_difference(model(ids).logits, load_model(tmp_path)(ids)) < CLOSE


def test_a_model_in_bfloat16_comes_in_as_float32(transformers: ModuleType, ids: torch.Tensor, tmp_path: Path) -> None:
    their_model(transformers, *THEIRS["qwen3"]).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, load_model(tmp_path)(ids)) < CLOSE
