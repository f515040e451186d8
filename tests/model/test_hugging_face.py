"""config.json in Hugging Face's words: both spellings, every family's own keys, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig, RopeScaling
from raymill.model.files import read_model_config
from raymill.model.hugging_face import config_from_hugging_face, config_to_hugging_face

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    **{"model_type": "gpt2", "vocab_size": 100, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-6, "head_dim": 16},
        {"rope_scaling": RopeScaling(kind="linear", factor=2)},
        {"rope_scaling": RopeScaling(kind="llama3", factor=2, original_max_seq_len=64, high_freq_factor=5)},
        {"rope_scaling": RopeScaling(kind="yarn", factor=2, original_max_seq_len=64, beta_slow=2)},
        {"architecture": "mistral", "sliding_window": 8},
        {"architecture": "mistral"},
        {"architecture": "qwen2", "sliding_window": 8},
        {"architecture": "qwen3", "head_dim": 128},
        {"architecture": "qwen3"},
        {"architecture": "gpt2", "num_kv_heads": 4, "tie_embeddings": False, "norm_eps": 1e-6},
    ],
)
def test_a_shape_survives_the_file(settings: dict[str, Any]) -> None:
    config = ModelConfig(**settings)
    values = json.loads(json.dumps(config_to_hugging_face(config, 300, 0)))
    assert config_from_hugging_face(values) == config
    values.pop("layer_types", None)  # as versions read it that do not know this key
    assert config_from_hugging_face(values) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 2e4, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 2e4, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4, **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4, **YARN, "attention_factor": 1.138629436111989}},
        {"rope_theta": 2e4, "original_max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_both_spellings_of_the_rotary_settings_are_read(rope: dict[str, Any]) -> None:
    config = config_from_hugging_face({**LLAMA, **rope})
    assert config.rope_theta == 2e4
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4, original_max_seq_len=16)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({**LLAMA, "sliding_window": 8}, None),
        ({**LLAMA, "model_type": "mistral"}, 4096),
        ({**LLAMA, "model_type": "mistral", "sliding_window": None}, None),
        ({**QWEN, "use_sliding_window": False}, None),
        ({**QWEN, "max_window_layers": 0}, 8),
        ({**QWEN, "max_window_layers": 2}, None),
        ({**QWEN, "layer_types": ["sliding_attention"] * 2}, 8),
        ({**QWEN, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, None),
    ],
)
def test_a_window_is_read_as_its_family_means_it(values: dict[str, Any], window: int | None) -> None:
    assert config_from_hugging_face(values).sliding_window == window


def test_what_a_file_leaves_out_is_what_its_family_means() -> None:
    llama, gpt2 = config_from_hugging_face(LLAMA), config_from_hugging_face(GPT2)
    assert (llama.num_kv_heads, llama.head_width, llama.tie_embeddings, llama.norm_eps) == (4, 8, False, 1e-6)
    assert (gpt2.hidden_dim, gpt2.tie_embeddings, gpt2.norm_eps) == (128, True, 1e-5)
    assert config_from_hugging_face({**LLAMA, "model_type": "qwen3"}).head_width == 128
    assert config_from_hugging_face({**GPT2, "resid_pdrop": 0.1}).dropout == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**LLAMA, "model_type": "gemma"}, "model_type is 'gemma'\n  why: supported: 'llama', 'mistral', "),
        ({key: value for key, value in LLAMA.items() if key != "model_type"}, "model_type is None"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu'\n  why: supported: 'silu'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is True\n  why: supported: False"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias is True"),
        ({**LLAMA, "model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config is"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2}}, "type is 'dynamic'\n  why: supported: 'default'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7}}, "mscale is 0.7"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1.0}}, "attention_factor is 1.0"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn"}}, "it has no factor"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling factor"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "the same settings for every"),
        ({**LLAMA, "rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({**QWEN, "max_window_layers": 1}, "some layers have a sliding window"),
        ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, "some layers have a sliding window"),
        ({**QWEN, "layer_types": {}}, "some layers have a sliding window"),
        ({**GPT2, "activation_function": "relu"}, "activation_function is 'relu'"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({**LLAMA, "hidden_size": None}, "it has no hidden_size"),
        ({**LLAMA, "hidden_size": "32"}, "hidden_size is '32'"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**LLAMA, "num_hidden_layers": 2.0}, "num_hidden_layers is 2.0\n  why: it must be a whole number above 0"),
        ({**LLAMA, "rope_theta": 10**400}, "rope_theta is 1000"),
        ({**LLAMA, "num_hidden_layers": 10**15}, "num_hidden_layers is 1000000000000000: "),
        ({**LLAMA, "num_key_value_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**LLAMA, "vocab_size": -1}, "vocab_size is -1"),
        ({**LLAMA, "vocab_size": True}, "vocab_size is True"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_message(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError) as refused:
        read_model_config(tmp_path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "hint: " in str(refused.value)


@pytest.mark.parametrize("text", ["[]", '{"a":', "\udcff", "[" * 100_000])
def test_a_file_that_holds_no_settings_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match="is damaged"):
        read_model_config(tmp_path)


def test_shapes_are_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import raymill.model.files"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
