"""What the sides that save have in common: a model of ours with AdamW's state, and what a turn of theirs is."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch
from shape import shape

from raymill.dataset.shards import read_index
from raymill.model.transformer import Transformer
from raymill.training.config import OptimizerConfig
from raymill.training.losses import next_token
from raymill.training.optimizer import build_optimizer


def stepped_model(options: Namespace) -> tuple[Transformer, torch.optim.Optimizer]:
    """After one step, so that the optimizer has its state."""
    model = Transformer(shape(options), read_index(options.tokens).vocab_size)
    model.initialize(0)
    optimizer = build_optimizer(model, OptimizerConfig())
    ids_BT = torch.arange(64)[None]
    model(ids_BT, None, next_token(ids_BT)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def saved(save: Callable[[], object], wait: Callable[[], object]) -> dict[str, float]:
    """One checkpoint: how long `save` stood still, what of it this thread worked, and when `wait` saw it done."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    save()
    stall = {"stall_s": time.perf_counter() - wall_s, "thread_cpu_s": time.thread_time() - cpu_s}
    wait()
    return stall | {"until_saved_s": time.perf_counter() - wall_s}
