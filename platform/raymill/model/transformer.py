"""The decoder in plain torch, for training and evaluation; module names are Hugging Face's, so weights need no map.

Shapes: B batch, T sequence, D model_dim, H num_heads, K num_kv_heads, C head_dim, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from raymill.model.attention import attend
from raymill.model.config import ModelConfig

Objective = Callable[[Tensor, nn.Linear], Tensor]
"""Takes the normed hidden states (B, T, D) and the output head; returns the summed loss."""


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
        self.head_width = config.head_width
        self.q_proj = nn.Linear(config.model_dim, config.num_heads * config.head_width, bias=False)
        self.k_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_width, bias=False)
        self.v_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_width, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BTHC = self.q_proj(x_BTD).view(batch, length, -1, self.head_width)
        k_BTKC = self.k_proj(x_BTD).view(batch, length, -1, self.head_width)
        v_BTKC = self.v_proj(x_BTD).view(batch, length, -1, self.head_width)
        cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
        y_BTHC = attend(
            rotate(q_BTHC, cos_T1C, sin_T1C), rotate(k_BTKC, cos_T1C, sin_T1C), v_BTKC, documents_BT=documents_BT
        )
        y_BTD: Tensor = self.o_proj(y_BTHC.reshape(batch, length, -1))
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

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, documents_BT)
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

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None, objective: Objective | None = None) -> Tensor:
        """ids_BT int64, T at most max_seq_len -> logits_BTV, or what the objective makes of the last hidden states.

        A position sees those before it and itself; with documents_BT, only those of its own document number. An
        objective stands here, inside forward, because some layouts hold the head's weight whole only while it runs.
        """
        length = ids_BT.shape[1]
        cos_TC, sin_TC = self.cos_TC[:length], self.sin_TC[:length]
        x_BTD = self.model.embed_tokens(ids_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos_TC, sin_TC, documents_BT)
        x_BTD = self.model.norm(x_BTD)
        result: Tensor = self.lm_head(x_BTD) if objective is None else objective(x_BTD, self.lm_head)
        return result


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (max_seq_len, head_dim), halves repeated (RoFormer, Llama layout)."""
    half = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), config.rope_theta**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to the last dimension; cos and sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
