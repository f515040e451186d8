"""The shape of a model: one decoder family, by config. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raymill.config import Config

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]


class RopeScaling(Config):
    """How rotary angles are stretched beyond the length a model was first trained at."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    """linear: positions divided by the factor; llama3: only slow frequencies; yarn: Peng et al. 2023."""
    factor: Annotated[float, Field(ge=1, le=1024)] = 1.0
    """Longest sequence over the original one."""
    original_max_seq_len: Annotated[int, Field(ge=8)] | None = None
    """Longest sequence of the first training, tokens; llama3 and yarn need it."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """llama3: wavelengths longer than original_max_seq_len over this are stretched fully."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """llama3: wavelengths shorter than original_max_seq_len over this are left alone."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """yarn: turns within the original length above which a frequency is left alone."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """yarn: turns below which a frequency is stretched fully."""

    @model_validator(mode="after")
    def _original(self) -> Self:
        if self.kind != "linear" and self.original_max_seq_len is None:
            raise ValueError(f"rope_scaling {self.kind} has no original_max_seq_len; fix: set it")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} {getattr(self, low)} is not below {high}; fix: set it below {getattr(self, high)}"
                )
        return self


class InitConfig(Config):
    """The draw of the first weights."""

    name: Literal["normal", "scaled", "xavier", "kaiming"] = "scaled"
    """normal: std everywhere; scaled: std, and std / sqrt(2 num_layers) into the residual (GPT-2); xavier: variance
    2 / (inputs + outputs) (Glorot and Bengio 2010); kaiming: variance 1 / inputs (He et al. 2015, linear gain)."""
    std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of embeddings, and of matrices under normal and scaled."""
    zero_projections: bool = False
    """Start the two projections into the residual at zero, so that every block begins as the identity."""


class ModelConfig(Config):
    """A decoder. vocab_size comes from the tokenizer."""

    architecture: Architecture = "llama"
    """Hugging Face family. llama, mistral: RoPE, RMSNorm, SwiGLU; qwen2: and biases on q, k, v; qwen3: and a norm on q
    and k instead; gpt2: learned positions, LayerNorm, GELU, biases."""
    num_layers: Annotated[int, Field(ge=1, le=1024)] = 4
    """Transformer blocks."""
    model_dim: Annotated[int, Field(ge=8, le=65536)] = 256
    """Width of the residual stream."""
    num_heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """Query heads."""
    num_kv_heads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Key and value heads; divides num_heads. gpt2 has as many as num_heads."""
    head_dim: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] | None = None
    """Width of a head; none means model_dim / num_heads. Not for gpt2."""
    hidden_dim: Annotated[int, Field(ge=8, le=262144)] = 704
    """Width inside the feed-forward."""
    max_seq_len: Annotated[int, Field(ge=8, le=1048576)] = 256
    """Longest sequence, tokens."""
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    """Positions a query sees, itself included; none means all before it. mistral, qwen2 and qwen3 only."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary angles. Not read by gpt2."""
    rope_scaling: RopeScaling | None = None
    """How rotary angles are stretched; none means not."""
    norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    """Added under the root in norms."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what attention and feed-forward add to the residual, and (gpt2) of the embeddings, dropped in training;
    attention weights are never dropped."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and (self.model_dim % self.num_heads or (self.model_dim // self.num_heads) % 2):
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

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Self:
        gpt2 = self.architecture == "gpt2"
        if gpt2 and self.num_kv_heads != self.num_heads:
            raise ValueError(f"gpt2 has no grouped queries; fix: set num_kv_heads to {self.num_heads}")
        if gpt2 and self.head_dim is not None:
            raise ValueError("gpt2 has no head_dim of its own; fix: leave it out")
        if self.architecture == "llama" and self.model_dim % self.num_heads:  # transformers refuses to load it
            raise ValueError(
                f"llama's model_dim {self.model_dim} is no multiple of num_heads {self.num_heads}, whatever head_dim is; "
                f"fix: set it to a multiple of {self.num_heads}, or set architecture to qwen3"
            )
        if gpt2 and self.rope_scaling is not None:
            raise ValueError("gpt2 has learned positions, no RoPE; fix: leave rope_scaling out")
        if self.sliding_window is not None and self.architecture in ("llama", "gpt2"):
            raise ValueError(
                f"{self.architecture} has no sliding window; fix: leave it out, or set architecture to mistral or qwen3"
            )
        return self

    @property
    def head_width(self) -> int:
        """C, the width of a head."""
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def qkv_bias(self) -> bool:
        return self.architecture in ("qwen2", "gpt2")

    @property
    def output_bias(self) -> bool:
        """Biases on attention's output."""
        return self.architecture == "gpt2"

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "qwen3"

    @property
    def gated(self) -> bool:
        """SwiGLU rather than GELU."""
        return self.architecture != "gpt2"

    @property
    def rotary(self) -> bool:
        """RoPE rather than learned positions."""
        return self.architecture != "gpt2"

    def num_parameters(self, vocab_size: int) -> int:
        """Parameters of the model, embeddings counted once when tied."""
        dim, width = self.model_dim, self.head_width
        queries, keys = self.num_heads * width, self.num_kv_heads * width
        attention = dim * (2 * queries + 2 * keys) + (2 * width if self.qk_norm else 0)
        attention += (queries + 2 * keys if self.qkv_bias else 0) + (0 if self.gated else dim)
        feed_forward = (3 if self.gated else 2) * dim * self.hidden_dim + (0 if self.gated else dim + self.hidden_dim)
        norm = dim if self.gated else 2 * dim
        embeddings = vocab_size * dim * (1 if self.tie_embeddings else 2)
        embeddings += 0 if self.rotary else self.max_seq_len * dim
        return self.num_layers * (attention + feed_forward + 2 * norm) + embeddings + norm

    def to_hugging_face(self, vocab_size: int, end_id: int) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        from raymill.model.hugging_face import config_to_hugging_face

        return config_to_hugging_face(self, vocab_size, end_id)

    @classmethod
    def from_hugging_face(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse."""
        from raymill.model.hugging_face import config_from_hugging_face

        return config_from_hugging_face(values)


_SHAPE = (
    "architecture",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "head_width",
    "hidden_dim",
    "max_seq_len",
    "tie_embeddings",
    "sliding_window",
    "norm_eps",
)
_ROPE = ("rope_theta", "rope_scaling")


def describe_difference(found: ModelConfig, wanted: ModelConfig) -> str:
    """The first field in which two models compute differently, with both values; "" when they are of one shape.

    What only training reads (dropout), or this architecture does not read, does not count.
    """
    for name in _SHAPE + (_ROPE if wanted.rotary else ()):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if isinstance(theirs, RopeScaling) and isinstance(ours, RopeScaling):
            fields = [field for field in RopeScaling.model_fields if getattr(theirs, field) != getattr(ours, field)]
            if fields:
                return f"rope_scaling.{fields[0]} is {getattr(theirs, fields[0])}, not {getattr(ours, fields[0])}"
        elif theirs != ours:
            return f"{'head_dim' if name == 'head_width' else name} is {_shown(theirs)}, not {_shown(ours)}"
    return ""


def _shown(value: object) -> str:
    if isinstance(value, RopeScaling):
        return f"{value.kind} by {value.factor}"
    return "none" if value is None else str(value)
