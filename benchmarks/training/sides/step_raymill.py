"""raymill's step: the model, the objective inside its forward, clipping and the optimizer, as the loop runs them.

`--variant` holds words: int8 (matrices in int8), documents (attention stays inside documents), muon, qwen3.
"""

from argparse import Namespace
from itertools import count
from typing import Any

import torch
from shape import shape
from timing import Batches, Loaded, describe, serve

from raymill.dataset.shards import read_index
from raymill.model.config import InitConfig
from raymill.model.transformer import Transformer
from raymill.training.config import OptimizerConfig
from raymill.training.losses import next_token
from raymill.training.optimizer import build_optimizer, set_learning_rate

_WARMUP_STEPS = 30
"""Without a warm-up AdamW's first steps go anywhere, and the losses of two runs go with them."""


def load(options: Namespace) -> Loaded:
    words = set(options.variant.split("+")) - {""}
    config = shape(options, architecture="qwen3" if "qwen3" in words else "llama")
    model, batches = Transformer(config, options.vocab_size), Batches(options)
    model.initialize(0, InitConfig())
    model.train()
    if "int8" in words:
        from raymill.model.int8 import use_int8

        for block in model.model.layers:
            use_int8(block)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon" if "muon" in words else "adamw", learning_rate=1e-3))
    end_id = read_index(options.tokens).end_of_document_id
    numbers = count(1)

    def work() -> dict[str, Any]:
        inputs_BT, targets_BT = batches.next()
        documents_BT = (inputs_BT == end_id).cumsum(1) if "documents" in words else None
        loss = model(inputs_BT, documents_BT, next_token(targets_BT)) / targets_BT.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, min(1.0, next(numbers) / _WARMUP_STEPS))
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    return describe(model, options), work


serve(load)
