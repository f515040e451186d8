"""A checkpoint as Hugging Face's libraries expect a model folder: `AutoModelForCausalLM`, `AutoTokenizer`, `pipeline`.

In: a checkpoint of any method; quantized matrices are widened to weight * scale, so logits differ from the served ones by
the rounding of activations alone. Out: model.safetensors, config.json, generation_config.json, tokenizer.json,
tokenizer_config.json with the chat template, special_tokens_map.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raymill.export.source import Source
from raymill.model.files import TOKENIZER, WEIGHTS, write_config
from raymill.model.weights import save_tensors, stored_weights
from raymill.tokenizer.tokenizer import Tokenizer
from raymill.tokenizer.training import IM_END, IM_START, spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_AS_IT_STANDS = {"AutoTokenizer": [None, "tokenizer.AsItStands"]}
"""transformers 5 takes every qwen2 tokenizer for Qwen's own, whatever class is named, and cuts numbers into single digits.
Where a class of the model's own is announced it does not, and without trust_remote_code reads tokenizer.json as it
stands. There is no such class: with trust_remote_code it says so."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as tokenizer/chat.py writes it."""

NOTE = (
    "text that spells a control token, such as <|im_end|>, is read as that token by other tokenizers: "
    "pass split_special_tokens=True where users type it"
)


def write(source: Source, folder: Path, precision: str) -> list[str]:
    """Writes the model folder."""
    dtype = DTYPES[precision]
    weights = {name: source.full(name).to(dtype) for name in source.weights}
    stored = stored_weights(source.config, weights)
    save_tensors(folder / WEIGHTS, {name: tensor.contiguous() for name, tensor in stored.items()})
    write_beside_weights(source, folder, dtype, {})
    return [NOTE]


def write_beside_weights(source: Source, folder: Path, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Everything but the weights; `settings` are added to config.json."""
    end_id = source.tokenizer.end_id
    config = source.config.to_hugging_face(source.vocab_size, end_id)
    write_config(folder, {**config, "torch_dtype": str(dtype).removeprefix("torch."), **settings})
    # A conversation ends a turn with <|im_end|>, a document ends with the end token.
    ends = [end_id, source.tokenizer.special_id(IM_END)]
    generation = {"bos_token_id": end_id, "eos_token_id": ends, "pad_token_id": end_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(source, folder / TOKENIZER)
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), source.end_token)
    extra = {"additional_special_tokens": [IM_START, IM_END]}
    _write_json(folder / "special_tokens_map.json", {**tokens, **extra})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        **extra,
        "model_max_length": source.config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if source.config.architecture == "qwen2":
        tokenizer["auto_map"] = _AS_IT_STANDS
    _write_json(folder / "tokenizer_config.json", tokenizer)


def _write_tokenizer(source: Source, path: Path) -> None:
    """tokenizer.json without the tokens that one brought from elsewhere would put around a text: ours puts none."""
    content = {**spec(source.inner), "post_processor": None}
    _write_json(path, content)
    Tokenizer.bring(path, source.end_token).save(path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
