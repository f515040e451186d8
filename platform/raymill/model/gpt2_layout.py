"""How gpt2's weights lie in a file: matrices (inputs, outputs), those of q, k and v in one. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from raymill.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"


def gpt2_rows(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(stored name, our names whose rows it holds one after the other, whether it is transposed)."""
    yield "wte.weight", (EMBEDDING,), False
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
