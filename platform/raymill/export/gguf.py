"""A checkpoint as one GGUF file, for llama.cpp and what is built on it, and OpenVINO GenAI.

In: a checkpoint of any method. Out: model.gguf with weights, tokenizer, chat template. int8 becomes Q8_0 and int4 becomes
Q4_0 with the same integers: a block of 32 takes the scale of its row or group, which int4 has as fp16 already and int8
rounds to it. Embedding and head are Q8_0 beside Q4_0, as in our int4. Vectors and learned positions stay fp32.

llama.cpp turns neighbouring numbers of a head where we turn those half a head apart: its `llama` architecture, which serves
llama and mistral, wants the rows of q and k in that order. The others it turns as we do.

Shapes: N output channels, K input channels, C head_width, B blocks of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymill.errors import UsageError
from raymill.export.gguf_tokenizer import vocabulary_of
from raymill.export.hugging_face import CHAT_TEMPLATE
from raymill.export.source import Quantized, Source, Weight
from raymill.model.config import ModelConfig
from raymill.model.rope import frequencies
from raymill.tokenizer.training import IM_END

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

FILE = "model.gguf"
_BLOCK = 32
"""Numbers of a row that share a scale in Q8_0 and Q4_0."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(source: Source, folder: Path, precision: str) -> list[str]:
    """Writes the file; UsageError where llama.cpp computes something else than the model."""
    from gguf import GGUFWriter

    _check_computable(source.config)
    writer = GGUFWriter(folder / FILE, _architecture(source.config))
    _add_settings(writer, source, precision)
    notes = _add_tokenizer(writer, source) if source.with_tokenizer else _leave_tokenizer_out(writer, source)
    for name, weight in _tensors(source):
        data, kind = _encode(name, weight, precision)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if source.config.rope_scaling is not None:
        notes.append("OpenVINO GenAI does not read the stretching of rotary positions; llama.cpp does")
    return notes


def _architecture(config: ModelConfig) -> str:
    return "llama" if config.architecture == "mistral" else config.architecture


def _check_computable(config: ModelConfig) -> None:
    fix = "choose format hugging_face or onnx"
    if config.sliding_window is not None and config.sliding_window < config.max_seq_len:
        what = f"GGUF cannot hold {config.architecture} with a sliding window of {config.sliding_window}"
        raise UsageError(what, why="llama.cpp runs this architecture without one: longer texts would differ", fix=fix)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3" and _architecture(config) != "llama":
        what = f"GGUF cannot hold {config.architecture} with rope_scaling llama3"
        raise UsageError(what, why="llama.cpp reads it for llama and mistral only", fix=fix)


def _add_settings(writer: GGUFWriter, source: Source, precision: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    config = source.config
    kinds = {
        "fp32": LlamaFileType.ALL_F32,
        "fp16": LlamaFileType.MOSTLY_F16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
        "q4_0": LlamaFileType.MOSTLY_Q4_0,
    }
    writer.add_file_type(kinds[precision])
    writer.add_quantization_version(2)  # of blocks whose scales are fp16
    writer.add_vocab_size(source.vocab_size)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if not config.rotary:
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # the latter is a tensor: rope_freqs
        return
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if scaling.kind == "linear" else RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        assert scaling.original_max_seq_len is not None
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _add_tokenizer(writer: GGUFWriter, source: Source) -> list[str]:
    vocabulary = vocabulary_of(source)
    end_id = source.tokenizer.end_id
    writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(end_id)
    writer.add_eos_token_id(end_id)
    writer.add_pad_token_id(end_id)
    writer.add_eot_token_id(source.tokenizer.special_id(IM_END))
    writer.add_add_bos_token(False)  # llama-bpe would put one before every text
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return vocabulary.notes


def _leave_tokenizer_out(writer: GGUFWriter, source: Source) -> list[str]:
    writer.add_tokenizer_model("none")
    return [f"there is no tokenizer in it: give ids, and stop at {source.tokenizer.end_id} yourself"]


def _tensors(source: Source) -> list[tuple[str, Weight]]:
    """Names and weights as llama.cpp has them."""
    config, weights = source.config, dict(source.weights)
    if config.architecture == "gpt2":
        weights = _join_qkv(config, weights)
    if _architecture(config) == "llama":
        for name in weights:
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
            if heads is not None:
                weights[name] = _interleave(weights[name], heads)
    found = [(_rename(name), weight) for name, weight in weights.items()]
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain, _ = frequencies(config.model_copy(update={"rope_scaling": None}))
        found.append(("rope_freqs.weight", (plain / frequencies(config)[0]).float()))  # what angles are divided by
    return found


def _rename(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, number, inside = stem.split(".", 3)
    return f"blk.{number}.{_NAMES.get(inside, inside)}.{kind}"


def _join_qkv(config: ModelConfig, weights: dict[str, Weight]) -> dict[str, Weight]:
    """gpt2's three matrices, and their biases, as one."""
    for number in range(config.num_layers):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"model.layers.{number}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            weights[f"model.layers.{number}.attn_qkv.{kind}"] = _stack(parts)
    return weights


def _stack(parts: list[Weight]) -> Weight:
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    values = torch.cat([part.values_NK for part in quantized])
    return Quantized(values, torch.cat([part.scale_NG for part in quantized]), quantized[0].bits)


def _interleave(weight: Weight, heads: int) -> Weight:
    """Rows 0, C/2, 1, C/2 + 1, ... of each head: pairs that turn together side by side."""

    def order(x: Tensor) -> Tensor:
        ordered: Tensor = x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return ordered

    return weight.rows(order) if isinstance(weight, Quantized) else order(weight)


def _encode(name: str, weight: Weight, precision: str) -> tuple[NDArray[Any], GGMLQuantizationType]:
    """A weight as bytes of the wanted kind."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    if isinstance(weight, Tensor) and (weight.ndim == 1 or name == "position_embd.weight"):
        return weight.float().numpy(), Kind.F32
    outer = name in ("token_embd.weight", "output.weight")
    kind = {"fp32": Kind.F32, "fp16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q8_0 if outer else Kind.Q4_0}[precision]
    if isinstance(weight, Quantized):
        if kind in (Kind.Q8_0, Kind.Q4_0) and _fits_blocks(weight, kind == Kind.Q4_0):
            return _blocks(weight), kind
        weight = weight.full()
    if kind in (Kind.Q8_0, Kind.Q4_0) and weight.shape[1] % _BLOCK:
        kind = Kind.F16  # rows that blocks do not divide stay whole
    return quants.quantize(weight.contiguous().numpy(), kind), kind


def _fits_blocks(weight: Quantized, four_bits: bool) -> bool:
    return weight.bits == (4 if four_bits else 8) and weight.group_size % _BLOCK == 0


def _blocks(weight: Quantized) -> NDArray[np.uint8]:
    """The same integers, each block behind its fp16 scale; in Q4_0 a byte holds numbers i and i + 16 of its block."""
    values_NBI = weight.values_NK.unflatten(1, (-1, _BLOCK)).numpy()
    rows = len(values_NBI)
    scale_NB = weight.scale_NG.repeat_interleave(weight.group_size // _BLOCK, dim=1).numpy().astype(np.float16)
    if weight.bits == 4:
        stored = (values_NBI + 8).astype(np.uint8)
        payload = stored[..., :16] | (stored[..., 16:] << 4)
    else:
        payload = values_NBI.view(np.uint8)
    heads = np.ascontiguousarray(scale_NB[:, :, None]).view(np.uint8)
    return np.concatenate([heads, payload], axis=-1).reshape(rows, -1)
