"""The reference: the nanoGPT recipe, rewritten from its published description (github.com/karpathy/nanoGPT).

GPT-2's layout without biases, as nanoGPT trains it by default: learned positions, LayerNorm, GELU, tied head, full
logits, flash attention through scaled_dot_product_attention, one packed projection for queries, keys and values.
Normal weights of 0.02, 0.02 / sqrt(2 layers) into the residual. Fused AdamW with betas 0.9 and 0.95, decay 0.1 of
matrices only, the gradient's norm clipped at 1, linear warm-up, half a cosine down to a tenth of the peak rate.

Batches come from raymill's own loader: sequences without replacement, cheaper than nanoGPT's gathering of slices.

Shapes: B sequences, T positions, D width, H heads, C width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from raymill.dataset.loader import Loader

_STD = 0.02
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1
_CLIP_NORM = 1.0
_FINAL_FRACTION = 0.1


@dataclass(frozen=True)
class Shape:
    """Of the model."""

    vocab_size: int
    num_layers: int
    num_heads: int
    model_dim: int
    max_seq_len: int


@dataclass(frozen=True)
class Recipe:
    """What the reference is tuned over."""

    learning_rate: float
    steps: int
    batch_size: int
    warmup_steps: int


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim = shape.model_dim
        self.num_heads = shape.num_heads
        self.ln_1 = nn.LayerNorm(dim, bias=False)
        self.c_attn = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_proj = nn.Linear(dim, dim, bias=False)
        self.ln_2 = nn.LayerNorm(dim, bias=False)
        self.c_fc = nn.Linear(dim, 4 * dim, bias=False)
        self.mlp_proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, dim = x_BTD.shape
        parts = self.c_attn(self.ln_1(x_BTD)).split(dim, dim=2)
        q_BHTC, k_BHTC, v_BHTC = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)
        y_BHTC = functional.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        x_BTD = x_BTD + self.attn_proj(y_BHTC.transpose(1, 2).reshape(batch, length, dim))
        y_BTD: Tensor = x_BTD + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x_BTD))))
        return y_BTD


class NanoGPT(nn.Module):
    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.model_dim)
        self.wpe = nn.Embedding(shape.max_seq_len, shape.model_dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.ln_f = nn.LayerNorm(shape.model_dim, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    std = _STD / math.sqrt(2 * shape.num_layers) if name.endswith("_proj.weight") else _STD
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.wte(ids_BT) + self.wpe.weight[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = functional.linear(self.ln_f(x_BTD), self.wte.weight)
        return logits_BTV


class Trainer:
    """One run of the reference, step by step."""

    def __init__(self, shape: Shape, recipe: Recipe, loader: Loader, seed: int) -> None:
        self.model = NanoGPT(shape, seed)
        self._recipe = recipe
        self._loader = loader
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            betas=_BETAS,
            fused=True,
        )

    def step(self, number: int) -> None:
        batch = self._loader.batch(number, 0, self._recipe.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(number, self._recipe)
        logits_BTV = self.model(batch.inputs_BT)
        functional.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def logits(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(ids_BT)
        return logits_BTV


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The rate of step `step`, from 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (_FINAL_FRACTION + (1 - _FINAL_FRACTION) * cosine)
