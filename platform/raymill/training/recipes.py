"""Recipes by size: what `train.preset` fills in where the job says nothing. DECISIONS.md has the tuning runs.

tiny and small carry the recipe of the race to a loss (benchmarks/training/recipe), tuned at 1.4 M parameters and runs of a
minute: Muon, queries and keys normed, projections into the residual at zero, a constant rate that falls to zero over the
second half, a head of its own, and embeddings that start wide and move 20 times as fast as the matrices. From there to
another width, Muon's rate goes by the inverse root of the width: its updates have a fixed root mean square, so their
spectral norm grows with that root, and what a step should change is the spectral norm (Yang et al. 2023, "A Spectral
Condition for Feature Learning").

124m and 1b cannot be tuned on two cores and follow rules of others:
- Muon's updates have the root mean square of AdamW's (training/muon.py), so a rate known to serve AdamW at a size serves
  Muon: GPT-3's 6e-4 at 125 M and 2e-4 at 1.3 B parameters (Brown et al. 2020, table 2.1), times 3, which served runs this
  short better at GPT-2's size (github.com/KellerJordan/modded-nanogpt: 1.8e-3 in its AdamW baseline of 124 M).
- Batches of half a million and a million tokens (the same table); 20 tokens a parameter (Hoffmann et al. 2022).
- A decay of 0.1: without it Muon's weights grow until the run is worse (Liu et al. 2025, "Muon is Scalable for LLM
  Training").
"""

from __future__ import annotations

from typing import Any

_FALLING = {"name": "wsd", "decay_fraction": 0.5, "final_fraction": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {
            "architecture": "qwen3",
            "num_layers": 3,
            "model_dim": 160,
            "num_heads": 5,
            "num_kv_heads": 5,
            "hidden_dim": 256,
            "max_seq_len": 256,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
        },
        "init": {"name": "kaiming", "std": 0.5, "zero_projections": True},
        "optimizer": {"name": "muon", "learning_rate": 2.5e-3, "adamw_learning_rate": 5e-2, "weight_decay": 0.0},
        "schedule": _FALLING | {"warmup_steps": 10},
        "steps": 400,
        "global_batch_size": 4,
        "microbatch_size": 2,
    },
    "small": {
        "model": {
            "architecture": "qwen3",
            "num_layers": 6,
            "model_dim": 384,
            "num_heads": 6,
            "num_kv_heads": 2,
            "hidden_dim": 768,
            "max_seq_len": 256,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
        },
        "init": {"name": "kaiming", "std": 0.5, "zero_projections": True},
        "optimizer": {"name": "muon", "learning_rate": 1.5e-3, "adamw_learning_rate": 3e-2, "weight_decay": 0.0},
        "schedule": _FALLING | {"warmup_steps": 20},
        "steps": 800,
        "global_batch_size": 8,
        "microbatch_size": 4,
    },
    "124m": {
        "model": {
            "architecture": "qwen3",
            "num_layers": 12,
            "model_dim": 768,
            "num_heads": 12,
            "num_kv_heads": 12,
            "hidden_dim": 2048,
            "max_seq_len": 1024,
            "norm_eps": 1e-6,
        },
        "init": {"name": "scaled", "std": 0.02, "zero_projections": True},
        "optimizer": {"name": "muon", "learning_rate": 1.8e-3, "weight_decay": 0.1},
        "schedule": _FALLING | {"warmup_steps": 100},
        "steps": 4750,
        "global_batch_size": 512,
        "microbatch_size": 16,
        "checkpoint_every_steps": 250,
        "validate_every_steps": 250,
    },
    "1b": {
        "model": {
            "architecture": "qwen3",
            "num_layers": 16,
            "model_dim": 2048,
            "num_heads": 16,
            "num_kv_heads": 8,
            "head_dim": 128,
            "hidden_dim": 8192,
            "max_seq_len": 2048,
            "norm_eps": 1e-6,
        },
        "init": {"name": "scaled", "std": 0.02, "zero_projections": True},
        "optimizer": {"name": "muon", "learning_rate": 6e-4, "weight_decay": 0.1},
        "schedule": _FALLING | {"warmup_steps": 500},
        "steps": 20_500,
        "global_batch_size": 512,
        "microbatch_size": 4,
        "checkpoint_every_steps": 500,
        "validate_every_steps": 500,
    },
}


def fill(values: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """`values` with the recipe's settings where it has none, group by group."""
    filled = dict(values)
    for key, setting in recipe.items():
        if isinstance(setting, dict) and isinstance(filled.get(key, {}), dict):
            filled[key] = fill(filled.get(key, {}), setting)
        else:
            filled.setdefault(key, setting)
    return filled
