"""config.json in Hugging Face's words, both ways, for the five architectures. No torch here.

Both spellings of the rotary settings are read: `rope_theta` and `rope_scaling` at the top, and `rope_parameters` as
transformers 5 writes it; the first is written, which every version reads. What a model of ours cannot compute is
refused with the key, the value found and what is supported; keys that change no logit are passed over.

Dropout belongs to a training run, not to a model: it is neither read nor written.
"""

from __future__ import annotations

import math
from typing import Any, get_args

from pydantic import ValidationError

from raymill.errors import ArtifactError
from raymill.model.config import Architecture, ModelConfig, RopeScaling

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_NAMES = {
    "num_layers": "num_hidden_layers",
    "model_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
_GPT2_NAMES = {
    "num_layers": "n_layer",
    "model_dim": "n_embd",
    "num_heads": "n_head",
    "hidden_dim": "n_inner",
    "max_seq_len": "n_positions",
}
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": {"hidden_act": ("silu",)},
    "qwen2": {"hidden_act": ("silu",)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
"""Values that are supported where a key is there; the first is what its absence means."""
_ROPE_KEYS = {
    "original_max_seq_len": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_ROPE_KEYS_OF = {
    "linear": (),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_seq_len", "beta_fast", "beta_slow"),
}


def config_to_hugging_face(config: ModelConfig, vocab_size: int, end_id: int) -> dict[str, Any]:
    """The `config.json` that transformers reads."""
    names = _NAMES if config.rotary else _GPT2_NAMES
    values = {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "torch_dtype": "float32",
    }
    if not config.rotary:
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return {**values, **no_dropout, "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps}
    return {
        **values,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": _rope_out(config.rope_scaling)} if config.rope_scaling else {}),
        **_window_out(config),
    }


def config_from_hugging_face(values: dict[str, Any], where: str | None = None) -> ModelConfig:
    """The inverse, for a config.json of any origin. ArtifactError names the key that is missing, wrong or unsupported."""
    reader = _Reader(values, where)
    architecture = reader.only("model_type", get_args(Architecture))
    for key, supported in _ONLY[architecture].items():
        reader.only(key, supported, absent=supported[0])
    reader.only("quantization_config", (None,))
    if architecture == "gpt2":
        settings = _gpt2_settings(reader)
    else:
        settings = _rotary_settings(reader, architecture)
    try:
        return ModelConfig(architecture=architecture, **settings)
    except ValidationError as error:
        first = error.errors()[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        names = {**_NAMES, "num_kv_heads": "num_key_value_heads"} if architecture != "gpt2" else _GPT2_NAMES
        shown = f"{names.get(ours, ours)} is {first['input']!r}: " if ours else ""
        raise reader.refusal(shown + first["msg"].removeprefix("Value error, ").partition("; fix: ")[0]) from None


class _Reader:
    """The values of one config.json, and the words in which it is refused."""

    def __init__(self, values: dict[str, Any], where: str | None) -> None:
        self.values = values
        self.where = where

    def refusal(self, what: str, why: str | None = None) -> ArtifactError:
        fix = f"name a model of {', '.join(get_args(Architecture))} in its usual form"
        return ArtifactError(what if self.where else f"config.json: {what}", where=self.where, why=why, fix=fix)

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise self.refusal(f"it has no {key}")
        return self.values[key]

    def only(self, key: str, supported: tuple[Any, ...], absent: Any = None) -> Any:
        """The value, which must be one of those supported."""
        found = self.values.get(key, absent)
        if found not in supported:
            raise self.refusal(f"{key} is {found!r}", why=f"supported: {', '.join(map(repr, supported))}")
        return found


def _gpt2_settings(reader: _Reader) -> dict[str, Any]:
    values = reader.values
    settings = {ours: reader.need(theirs) for ours, theirs in _GPT2_NAMES.items() if ours != "hidden_dim"}
    return {
        **settings,
        "num_kv_heads": settings["num_heads"],
        "hidden_dim": values.get("n_inner") or 4 * settings["model_dim"],
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": values.get("tie_word_embeddings", True),
    }


def _rotary_settings(reader: _Reader, architecture: str) -> dict[str, Any]:
    values = reader.values
    settings = {ours: reader.need(theirs) for ours, theirs in _NAMES.items()}
    theta, scaling = _rope_in(reader)
    width = values.get("head_dim") or (128 if architecture == "qwen3" else None)
    if isinstance(settings["model_dim"], int) and width is not None:
        width = None if width * settings["num_heads"] == settings["model_dim"] else width
    return {
        **settings,
        "num_kv_heads": values.get("num_key_value_heads") or settings["num_heads"],
        "head_dim": width,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _window_in(reader, architecture),
    }


def _rope_in(reader: _Reader) -> tuple[Any, RopeScaling | None]:
    """Base of the angles and their stretching, from either spelling."""
    values = reader.values
    rope = _Reader(values.get("rope_scaling") or values.get("rope_parameters") or {}, reader.where)
    theta = rope.values.get("rope_theta") or values.get("rope_theta", 10000.0)
    for source in (reader, rope):
        source.only("partial_rotary_factor", (1.0, None))
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in _ROPE_KEYS_OF:
        raise reader.refusal(f"rope_type is {kind!r}", why=f"supported: default, {', '.join(_ROPE_KEYS_OF)}")
    factor = rope.need("factor")
    if kind == "yarn":
        rope.only("attention_factor", (None, 0.1 * math.log(factor) + 1))
        rope.only("truncate", (True,), absent=True)
        for key in ("mscale", "mscale_all_dim"):
            rope.only(key, (None,))
    found = {ours: rope.values.get(_ROPE_KEYS[ours]) for ours in _ROPE_KEYS_OF[kind]}
    if "original_max_seq_len" in found:
        found["original_max_seq_len"] = (
            values.get("original_max_position_embeddings")
            or found["original_max_seq_len"]
            or reader.need("max_position_embeddings")
        )
    given = {ours: value for ours, value in found.items() if value is not None}
    try:
        return theta, RopeScaling(kind=kind, factor=factor, **given)
    except ValidationError as error:
        first = error.errors()[0]
        raise reader.refusal(f"rope_scaling: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _rope_out(scaling: RopeScaling) -> dict[str, Any]:
    parts = {_ROPE_KEYS[ours]: getattr(scaling, ours) for ours in _ROPE_KEYS_OF[scaling.kind]}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **parts}


def _window_in(reader: _Reader, architecture: str) -> Any:
    """The window that every layer has; layers that differ are refused."""
    values = reader.values
    if architecture == "llama":
        return None
    if architecture == "mistral":
        return values.get("sliding_window", 4096)
    window = values.get("sliding_window", 4096)
    if not values.get("use_sliding_window", False) or window is None:
        return None
    layers = reader.need("num_hidden_layers")
    full = min(values.get("max_window_layers", 28), layers)
    kinds = values.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1:
        why = "supported: a window in every layer, or in none"
        raise reader.refusal(f"layer_types are {' and '.join(sorted(set(kinds)))}", why=why)
    return window if kinds[0] == "sliding_attention" else None


def _window_out(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    if config.architecture == "llama":
        return {}
    if config.architecture == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["sliding_attention"] * config.num_layers
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0, "layer_types": kinds}
