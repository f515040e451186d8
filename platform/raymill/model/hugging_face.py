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
        raise reader.refusal(shown + _plain(first["msg"])) from None


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").partition("; fix: ")[0]


class _Reader:
    """The values of one config.json, and the words in which it is refused."""

    def __init__(self, values: dict[str, Any], where: str | None) -> None:
        self.values = values
        self.where = where

    def refusal(self, what: str, why: str | None = None) -> ArtifactError:
        fix = f"name a model of {', '.join(get_args(Architecture))} in its usual form"
        return ArtifactError(what if self.where else f"config.json: {what}", where=self.where, why=why, fix=fix)

    def whole(self, key: str, absent: int | None = None) -> int:
        """A whole number above 0; None is as good as absent."""
        return int(self._number(key, absent, int))

    def number(self, key: str, absent: float | None = None) -> float:
        """A number above 0; None is as good as absent."""
        return self._number(key, absent, int, float)

    def _number(self, key: str, absent: float | None, *kinds: type) -> float:
        found: Any = self.values.get(key)
        if found is None:
            found = absent
        if found is None:
            raise self.refusal(f"it has no {key}")
        if type(found) not in kinds or not 0 < found < 1e18:  # True is an int, but not for this
            kind = "whole number" if kinds == (int,) else "number"
            raise self.refusal(f"{key} is {repr(found)[:60]}", why=f"it must be a {kind} above 0")
        number: float = found
        return number

    def section(self, *keys: str) -> _Reader:
        """The first of some sections that holds anything."""
        found: Any = next((self.values[key] for key in keys if self.values.get(key)), {})
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise self.refusal(f"{keys[0]} is {found!r}"[:200], why="supported: the same settings for every layer")
        return _Reader(found, self.where)

    def only(self, key: str, supported: tuple[Any, ...], absent: Any = None) -> Any:
        """The value, which must be one of those supported."""
        found = self.values.get(key, absent)
        if found not in supported:
            raise self.refusal(f"{key} is {found!r}", why=f"supported: {', '.join(map(repr, supported))}")
        return found


def _gpt2_settings(reader: _Reader) -> dict[str, Any]:
    settings = {ours: reader.whole(theirs) for ours, theirs in _GPT2_NAMES.items() if ours != "hidden_dim"}
    return {
        **settings,
        "num_kv_heads": settings["num_heads"],
        "hidden_dim": reader.whole("n_inner", absent=4 * settings["model_dim"]),
        "norm_eps": reader.number("layer_norm_epsilon", absent=1e-5),
        "tie_embeddings": reader.only("tie_word_embeddings", (True, False), absent=True),
    }


def _rotary_settings(reader: _Reader, architecture: str) -> dict[str, Any]:
    settings = {ours: reader.whole(theirs) for ours, theirs in _NAMES.items()}
    dim, heads = settings["model_dim"], settings["num_heads"]
    width = reader.whole("head_dim", absent=128 if architecture == "qwen3" else max(1, dim // heads))
    theta, scaling = _rope_in(reader)
    return {
        **settings,
        "num_kv_heads": reader.whole("num_key_value_heads", absent=heads),
        "head_dim": None if width * heads == dim else width,
        "norm_eps": reader.number("rms_norm_eps", absent=1e-6),
        "tie_embeddings": reader.only("tie_word_embeddings", (True, False), absent=False),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _window_in(reader, architecture),
    }


def _rope_in(reader: _Reader) -> tuple[float, RopeScaling | None]:
    """Base of the angles and their stretching, from either spelling."""
    rope = reader.section("rope_scaling", "rope_parameters")
    theta = rope.number("rope_theta", absent=reader.number("rope_theta", absent=10000.0))
    for source in (reader, rope):
        source.only("partial_rotary_factor", (1.0, None))
    kind_key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.only(kind_key, ("default", *_ROPE_KEYS_OF), absent="default")
    if kind == "default":
        return theta, None
    settings: dict[str, Any] = {"kind": kind, "factor": rope.number("factor")}
    if kind == "yarn":
        rope.only("attention_factor", (None, 0.1 * math.log(settings["factor"]) + 1))
        rope.only("truncate", (True,), absent=True)
        for key in ("mscale", "mscale_all_dim"):
            rope.only(key, (None,))
    for ours in _ROPE_KEYS_OF[kind]:
        theirs = _ROPE_KEYS[ours]
        if ours == "original_max_seq_len":
            inside = rope.whole(theirs, absent=reader.whole("max_position_embeddings"))
            settings[ours] = reader.whole(theirs, absent=inside)
        elif rope.values.get(theirs) is not None:
            settings[ours] = rope.number(theirs)
    try:
        return theta, RopeScaling(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(_ROPE_KEYS.get(str(part), str(part)) for part in first["loc"])
        raise reader.refusal(f"rope_scaling {where}: {_plain(first['msg'])}".replace(" :", ":")) from None


def _rope_out(scaling: RopeScaling) -> dict[str, Any]:
    parts = {_ROPE_KEYS[ours]: getattr(scaling, ours) for ours in _ROPE_KEYS_OF[scaling.kind]}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **parts}


def _window_in(reader: _Reader, architecture: str) -> int | None:
    """The window that every layer has; layers that differ are refused."""
    if architecture == "llama" or reader.values.get("sliding_window", 4096) is None:
        return None
    window = reader.whole("sliding_window", absent=4096)
    if architecture == "mistral":
        return window
    if not reader.only("use_sliding_window", (True, False), absent=False):
        return None
    kinds = reader.values.get("layer_types")
    if kinds is None:
        full = 0 if reader.values.get("max_window_layers") == 0 else reader.whole("max_window_layers", absent=28)
        kinds = ["full_attention"] if full else []
        kinds += ["sliding_attention"] if full < reader.whole("num_hidden_layers") else []
    if not isinstance(kinds, list) or not kinds or any(kind != kinds[0] for kind in kinds):
        raise reader.refusal("some layers have a sliding window", why="supported: a window in every layer, or in none")
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
