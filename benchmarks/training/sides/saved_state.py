"""What the sides that save have in common: a model of ours with AdamW's state, and how a stall is timed."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch

from raymill.dataset.shards import read_index
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.training.config import OptimizerConfig
from raymill.training.losses import next_token
from raymill.training.optimizer import build_optimizer


def stepped_model(options: Namespace) -> tuple[Transformer, torch.optim.Optimizer]:
    """After one step, so that the optimizer has its state."""
    heads = options.dim // 64
    config = ModelConfig(
        num_layers=options.layers,
        model_dim=options.dim,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_dim=options.dim * 8 // 3,
        max_seq_len=options.seq_len,
    )
    model = Transformer(config, read_index(options.tokens).vocab_size)
    model.initialize(0)
    optimizer = build_optimizer(model, OptimizerConfig())
    ids_BT = torch.arange(64)[None]
    model(ids_BT, None, next_token(ids_BT)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(call: Callable[[], object]) -> dict[str, float]:
    """How long the caller stood still, and what of it this thread worked."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    call()
    return {"stall_s": time.perf_counter() - wall_s, "thread_cpu_s": time.thread_time() - cpu_s}
