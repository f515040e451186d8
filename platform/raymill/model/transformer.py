"""The decoder in plain torch, for training and evaluation. Module names are those of Hugging Face's Llama for all.

What an architecture has is chosen when its modules are made; the forward pass is the same for all: embed, run the
blocks, finish. Layouts that split a model call these three themselves.

Shapes: B batch, T sequence (or the part of it that is here), S whole sequence, D model_dim, H num_heads, K num_kv_heads,
C head_width, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raymill.model import kernels
from raymill.model.attention import attend
from raymill.model.config import InitConfig, ModelConfig
from raymill.model.initialize import initialize
from raymill.model.linear import Linear, is_hooked, joins_norm, norm_linears, swiglu_linear
from raymill.model.rope import rotary_tables

Objective = Callable[[Tensor, nn.Linear], Tensor]
"""Takes the normed hidden states (B, T, D) and the output head; returns the summed loss."""


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm."""
        return kernels.add_rms_norm(x, y, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Ba et al. 2016."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm."""
        total = x + y
        return total, self(total)


class Attention(nn.Module):
    """Grouped-query attention whose queries and keys know no positions: gpt2's are in the embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, width = config.model_dim, config.head_width
        self.head_width = width
        self.window = config.sliding_window
        self.attend: Callable[..., Tensor] = attend  # a layout may bring its own
        self.q_proj = Linear(dim, config.num_heads * width, bias=config.qkv_bias)
        self.k_proj = Linear(dim, config.num_kv_heads * width, bias=config.qkv_bias)
        self.v_proj = Linear(dim, config.num_kv_heads * width, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * width, dim, bias=config.output_bias)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        projected = tuple(layer(x_BTD) for layer in self.readers())
        return self.mix(projected, cos_TC, sin_TC, documents_BT)

    def readers(self) -> tuple[Linear, ...]:
        """The layers that read the normed input."""
        return self.q_proj, self.k_proj, self.v_proj

    def mix(self, projected: tuple[Tensor, ...], cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        """What follows on queries, keys and values."""
        batch, length, _ = projected[0].shape
        q_BTHC, k_BTKC, v_BTKC = (part.view(batch, length, -1, self.head_width) for part in projected)
        q_BTHC, k_BTKC = self.turn(q_BTHC, k_BTKC, cos_TC, sin_TC)
        y_BTHC = self.attend(q_BTHC, k_BTKC, v_BTKC, documents_BT=documents_BT, window=self.window)
        y_BTD: Tensor = self.o_proj(y_BTHC.reshape(batch, length, -1))
        return y_BTD

    def turn(self, q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet."""
        return q_BTHC, k_BTKC


class RotaryAttention(Attention):
    """Queries and keys are turned by their positions: llama, mistral, qwen2."""

    def turn(self, q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rotate(q_BTHC, k_BTKC, cos_TC, sin_TC)


class NormedRotaryAttention(Attention):
    """Each head of queries and keys is normed before it is turned: qwen3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps)
        self.k_norm = RMSNorm(config.head_width, config.norm_eps)

    def turn(self, q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
        q_weight_C, k_weight_C = self.q_norm.weight, self.k_norm.weight
        return kernels.norm_rotate(q_BTHC, k_BTKC, q_weight_C, k_weight_C, self.q_norm.eps, cos_TC, sin_TC)


class FeedForward(nn.Module):
    """Two matrices around a GELU: gpt2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.model_dim, config.hidden_dim)
        self.down_proj = Linear(config.hidden_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down_proj(kernels.gelu(self.up_proj(x_BTD)))
        return y_BTD


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): all but gpt2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.model_dim, config.hidden_dim, bias=False)
        self.up_proj = Linear(config.model_dim, config.hidden_dim, bias=False)
        self.down_proj = Linear(config.hidden_dim, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mix(tuple(layer(x_BTD) for layer in self.readers()))

    def readers(self) -> tuple[Linear, ...]:
        """The layers that read the normed input."""
        return self.gate_proj, self.up_proj

    def mix(self, projected: tuple[Tensor, ...]) -> Tensor:
        """What follows on gate and up."""
        gate_BTF, up_BTF = projected
        if getattr(self.down_proj, "bare", False):
            return swiglu_linear(gate_BTF, up_BTF, self.down_proj.weight)
        y_BTD: Tensor = self.down_proj(kernels.swiglu(gate_BTF, up_BTF))
        return y_BTD


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to what came in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = make_attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = GatedFeedForward(config) if config.gated else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        if self._leaves_norms(x_BTD):
            return self._forward_lean(x_BTD, cos_TC, sin_TC, documents_BT)
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, documents_BT)
        x_BTD, normed_BTD = self.post_attention_layernorm.add(x_BTD, self.dropout(y_BTD))
        out_BTD: Tensor = x_BTD + self.dropout(self.mlp(normed_BTD))
        return out_BTD

    def _leaves_norms(self, x_BTD: Tensor) -> bool:
        """Whether norms can be joined to the layers that read them: nothing stands between or listens."""
        norm, after, mlp = self.input_layernorm, self.post_attention_layernorm, self.mlp
        if not isinstance(mlp, GatedFeedForward) or any(map(is_hooked, (norm, after, self.self_attn, mlp))):
            return False
        return joins_norm(x_BTD, norm.weight, self.self_attn.readers()) and joins_norm(
            x_BTD, after.weight, mlp.readers()
        )

    def _forward_lean(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        """The same without keeping either norm's output."""
        norm, after, mlp = self.input_layernorm, self.post_attention_layernorm, self.mlp
        assert isinstance(mlp, GatedFeedForward)
        _, projected = norm_linears(x_BTD, None, norm.weight, norm.eps, self.self_attn.readers())
        y_BTD = self.self_attn.mix(projected, cos_TC, sin_TC, documents_BT)
        del projected
        x_BTD, projected = norm_linears(x_BTD, self.dropout(y_BTD), after.weight, after.eps, mlp.readers())
        del y_BTD
        out_BTD: Tensor = x_BTD + self.dropout(mlp.mix(projected))
        return out_BTD


class Decoder(nn.Module):
    """Everything below the output head; Hugging Face calls it `model`."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.model_dim)
        self.embed_positions = None if config.rotary else nn.Embedding(config.max_seq_len, config.model_dim)
        self.dropout = nn.Dropout(0.0 if config.rotary else config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)


class Transformer(nn.Module):
    """Ids in, next-token logits out."""

    cos_TC: Tensor
    sin_TC: Tensor
    checkpoint_activations = False
    """Keep only each block's input for the backward pass, which runs the block again: the same gradients to the bit."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = Decoder(config, vocab_size)
        self.lm_head = Linear(config.model_dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos_TC, sin_TC = rotary_tables(config)
        self.register_buffer("cos_TC", cos_TC, persistent=False)
        self.register_buffer("sin_TC", sin_TC, persistent=False)

    def initialize(self, seed: int, init: InitConfig | None = None) -> None:
        """Draws the first weights; the same seed gives every parameter the same bits wherever it lies."""
        initialize(self, seed, init or InitConfig(), self.config.num_layers)

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None, objective: Objective | None = None) -> Tensor:
        """ids_BT int64, T at most max_seq_len -> logits_BTV, or what the objective makes of the last hidden states.

        A position sees those before it and itself; with documents_BT (never falling along T), only those of its own
        document number. An objective stands here, inside forward, because some layouts hold the head's weight whole
        only while it runs.
        """
        x_BTD = self.run_blocks(self.embed(ids_BT, documents_BT), documents_BT)
        return self.finish(x_BTD, objective)

    def embed(self, ids_BT: Tensor, documents_BS: Tensor | None = None, first: int = 0) -> Tensor:
        """What the first block reads. Learned positions begin again with each document.

        ids_BT are positions first to first + T of their sequences, documents_BS the numbers of the sequences from 0 on.
        """
        x_BTD: Tensor = self.model.embed_tokens(ids_BT)
        if self.model.embed_positions is None:
            return x_BTD
        stop = first + ids_BT.shape[1]
        positions = positions_in_documents(stop, documents_BS, ids_BT.device)[..., first:]
        embedded_BTD: Tensor = self.model.dropout(x_BTD + self.model.embed_positions(positions))
        return embedded_BTD

    def run_blocks(self, x_BTD: Tensor, documents_BS: Tensor | None = None, first: int = 0) -> Tensor:
        """Every block this model holds, in order; x_BTD are positions first to first + T of their sequences."""
        stop = first + x_BTD.shape[1]
        cos_TC, sin_TC = self.cos_TC[first:stop], self.sin_TC[first:stop]
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.model.layers:
            if again:
                x_BTD = checkpoint(block, x_BTD, cos_TC, sin_TC, documents_BS, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos_TC, sin_TC, documents_BS)
        return x_BTD

    def finish(self, x_BTD: Tensor, objective: Objective | None = None) -> Tensor:
        """The last norm, then logits_BTV or the objective's summed loss."""
        x_BTD = self.model.norm(x_BTD)
        result: Tensor = self.lm_head(x_BTD) if objective is None else objective(x_BTD, self.lm_head)
        return result


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The architecture's norm over model_dim."""
    return (RMSNorm if config.gated else LayerNorm)(config.model_dim, config.norm_eps)


def make_attention(config: ModelConfig) -> Attention:
    """The architecture's attention."""
    if config.qk_norm:
        return NormedRotaryAttention(config)
    return RotaryAttention(config) if config.rotary else Attention(config)


def positions_in_documents(length: int, documents_BT: Tensor | None, device: torch.device) -> Tensor:
    """Positions (T), or with document numbers (B, at least T) counted from the beginning of each document."""
    positions_T = torch.arange(length, device=device)
    if documents_BT is None:
        return positions_T
    documents_BT = documents_BT[:, :length]
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return positions_T - torch.where(begins_BT, positions_T, 0).cummax(dim=1).values
