"""The nanoGPT recipe's step: forward, cross-entropy over all logits, backward, clipping, fused AdamW."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from timing import Batches, Loaded, describe, serve

from benchmarks.training.recipe.nanogpt import Recipe, Shape, Trainer


def load(options: Namespace) -> Loaded:
    batches = Batches(options)

    def batch(step: int, first: int, count: int) -> SimpleNamespace:
        inputs_BT, targets_BT = batches.next()
        return SimpleNamespace(inputs_BT=inputs_BT, targets_BT=targets_BT)

    shape = Shape(options.vocab_size, options.layers, options.dim // 64, options.dim, options.seq_len)
    recipe = Recipe(learning_rate=1e-3, steps=1000, batch_size=options.batch_size, warmup_steps=10)
    trainer = Trainer(shape, recipe, SimpleNamespace(batch=batch), seed=0)
    number = 0

    def work() -> dict[str, Any]:
        nonlocal number
        trainer.step(number)
        number += 1
        return {}

    return describe(trainer.model, options), work


serve(load)
