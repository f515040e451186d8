"""Our model in the shape that all sides have: heads of 64, a gated hidden width of 8/3 of the model's."""

from argparse import Namespace
from typing import Any

from raymill.model.config import ModelConfig


def shape(options: Namespace, **more: Any) -> ModelConfig:
    heads = options.dim // 64
    return ModelConfig(
        num_layers=options.layers,
        model_dim=options.dim,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_dim=options.dim * 8 // 3,
        max_seq_len=options.seq_len,
        **more,
    )
