"""The shape of a model, and its Hugging Face `config.json`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from raymill.config import Config


class ModelConfig(Config):
    """A Llama-family decoder: RoPE, RMSNorm, SwiGLU, grouped-query attention. vocab_size comes from the tokenizer."""

    num_layers: Annotated[int, Field(ge=1, le=1024)] = 4
    """Transformer blocks."""
    model_dim: Annotated[int, Field(ge=8, le=65536)] = 256
    """Width of the residual stream."""
    num_heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """Query heads; head_dim is model_dim / num_heads and must be even."""
    num_kv_heads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Key and value heads; divides num_heads."""
    hidden_dim: Annotated[int, Field(ge=8, le=262144)] = 704
    """Width inside the SwiGLU feed-forward."""
    max_seq_len: Annotated[int, Field(ge=8, le=1048576)] = 256
    """Longest sequence, tokens."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary angles."""
    norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    """Added under the root in RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.model_dim % self.num_heads or (self.model_dim // self.num_heads) % 2:
            raise ValueError(
                f"model_dim {self.model_dim} over num_heads {self.num_heads} is not an even whole number; "
                f"fix: set model_dim to a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"fix: set num_kv_heads to a divisor of {self.num_heads}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def num_parameters(self, vocab_size: int) -> int:
        """Parameters of the model, embeddings counted once when tied."""
        attention = self.model_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        block = attention + 3 * self.model_dim * self.hidden_dim + 2 * self.model_dim
        embeddings = vocab_size * self.model_dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + self.model_dim

    def to_hugging_face(self, vocab_size: int, end_id: int) -> dict[str, Any]:
        """The `config.json` that transformers reads for LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.model_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden_dim,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "bos_token_id": end_id,
            "eos_token_id": end_id,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hugging_face(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse, for a LlamaForCausalLM config."""
        return cls(
            num_layers=values["num_hidden_layers"],
            model_dim=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
            hidden_dim=values["intermediate_size"],
            max_seq_len=values["max_position_embeddings"],
            rope_theta=values.get("rope_theta", 10000.0),
            norm_eps=values["rms_norm_eps"],
            tie_embeddings=values["tie_word_embeddings"],
        )
