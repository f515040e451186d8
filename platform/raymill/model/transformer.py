"""The decoder in plain torch, for training and evaluation; module names are Hugging Face's, so weights need no map.

Shapes: B batch, T sequence, D model_dim, H num_heads, K num_kv_heads, C head_dim, V vocab_size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from raymill.model.config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.model_dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, seen_B1TT: Tensor | None) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BHTC = self.q_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k_BKTC = self.k_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        v_BKTC = self.v_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        y_BHTC = functional.scaled_dot_product_attention(
            rotate(q_BHTC, cos_TC, sin_TC),
            rotate(k_BKTC, cos_TC, sin_TC),
            v_BKTC,
            attn_mask=seen_B1TT,
            is_causal=seen_B1TT is None,
            enable_gqa=True,
        )
        y_BTD: Tensor = self.o_proj(y_BHTC.transpose(1, 2).reshape(batch, length, -1))
        return y_BTD


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.model_dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.model_dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.model_dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.model_dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, seen_B1TT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, seen_B1TT)
        y_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return y_BTD


class Decoder(nn.Module):
    """Everything below the output head; Hugging Face calls it `model`."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim, config.norm_eps)


class Transformer(nn.Module):
    """Ids in, next-token logits out."""

    cos_TC: Tensor
    sin_TC: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = Decoder(config, vocab_size)
        self.lm_head = nn.Linear(config.model_dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos_TC, sin_TC = rotary_tables(config)
        self.register_buffer("cos_TC", cos_TC, persistent=False)
        self.register_buffer("sin_TC", sin_TC, persistent=False)

    def initialize(self, seed: int) -> None:
        """Normal weights, std 0.02; the two projections into the residual are scaled by 1/sqrt(2 num_layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    parameter.fill_(1.0)
                    continue
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """ids_BT int64, T at most max_seq_len -> logits_BTV.

        A position sees those before it and itself; with documents_BT, only those of its own document number.
        """
        seen_B1TT = None if documents_BT is None else seen_within_documents(documents_BT)
        length = ids_BT.shape[1]
        cos_TC, sin_TC = self.cos_TC[:length], self.sin_TC[:length]
        x_BTD = self.model.embed_tokens(ids_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos_TC, sin_TC, seen_B1TT)
        logits_BTV: Tensor = self.lm_head(self.model.norm(x_BTD))
        return logits_BTV


def seen_within_documents(documents_BT: Tensor) -> Tensor:
    """Which keys each query sees, (B, 1, T, T) bool: those of its document up to itself, so never none.

    Positions are not counted anew per document: rotary scores depend on the distance of query and key alone.
    Costs T x T bytes a sequence; on one core a training step takes about 1.1 (T 256) to 1.3 times (T 2,048) as long.
    """
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril()[:, None]


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (max_seq_len, head_dim), halves repeated (RoFormer, Llama layout)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), config.rope_theta**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to the last dimension; cos and sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
