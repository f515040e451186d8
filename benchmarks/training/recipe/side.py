"""One run of one side, in a process of its own: trains to the end and says what it took, as one line of JSON.

Timed are the steps alone, from reading the batch to the changed weights, in CPU-seconds of this process; one step
before the run, on a model that is thrown away, pays for what libraries do once. Validations stand outside the time;
those on the way are of the same few sequences, and each is told as it comes. With a file to keep its state in, a run that
was killed goes on from its last validation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.recipe import nanogpt, ours, settings
from raymill.dataset.loader import Loader
from raymill.dataset.shards import TokenStream

_SEQUENCES_AT_ONCE = 16
_SEQUENCES_ON_THE_WAY = 64


class Trainer(Protocol):
    """What both sides are."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, number: int) -> None: ...

    def logits(self, ids_BT: Tensor) -> Tensor: ...


def build(side: str, size: settings.Size, shards: Path, seed: int) -> tuple[Trainer, int, int]:
    """The trainer of a side, its steps, and the tokens of a step."""
    stream = TokenStream(shards, "train")
    vocab_size = stream.index.vocab_size
    if side == "raymill":
        config = size.ours
        loader = Loader(
            stream,
            seq_len=config.model.max_seq_len,
            global_batch_size=config.global_batch_size,
            seed=seed,
            packing=config.packing,
        )
        tokens = config.global_batch_size * config.model.max_seq_len
        return ours.Trainer(config, vocab_size, loader, seed), config.steps, tokens
    recipe, shape = size.reference, replace(size.shape, vocab_size=vocab_size)
    loader = Loader(stream, seq_len=shape.max_seq_len, global_batch_size=recipe.batch_size, seed=seed)
    return nanogpt.Trainer(shape, recipe, loader, seed), recipe.steps, recipe.batch_size * shape.max_seq_len


def train(
    side: str,
    size: settings.Size,
    shards: Path,
    seed: int,
    final_sequences: int | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """The run's CPU-seconds, its loss in nats over the whole val split or `final_sequences` of it, and the way there."""
    build(side, size, shards, seed)[0].step(0)
    trainer, steps, tokens = build(side, size, shards, seed)
    val = TokenStream(shards, "val")
    run = f"{side} {size} {seed}"
    curve = [] if kept is None else _resume(trainer, kept, run)
    first, cpu_s = (curve[-1]["step"], curve[-1]["cpu_s"]) if curve else (0, 0.0)
    for number in range(first, steps):
        began = time.process_time()
        trainer.step(number)
        cpu_s += time.process_time() - began
        done = number + 1
        if done % max(1, steps // size.points) == 0 or done == steps:
            loss = validate(trainer, val, _SEQUENCES_ON_THE_WAY)
            curve.append({"step": done, "tokens": done * tokens, "cpu_s": cpu_s, "val_loss": loss})
            print(f"    {done * tokens:,} tokens, {cpu_s:.1f} CPU-s: {loss:.4f}", file=sys.stderr, flush=True)
            if kept is not None:
                _keep(trainer, kept, run, curve)
    return {
        "cpu_s": cpu_s,
        "val_loss": validate(trainer, val, final_sequences),
        "steps": steps,
        "tokens": steps * tokens,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "seed": seed,
        "curve": curve,
    }


def _keep(trainer: Trainer, kept: Path, run: str, curve: list[dict[str, Any]]) -> None:
    weights, moments = trainer.model.state_dict(), trainer.optimizer.state_dict()
    aside = kept.with_suffix(".part")
    torch.save({"run": run, "curve": curve, "model": weights, "optimizer": moments}, aside)
    aside.replace(kept)


def _resume(trainer: Trainer, kept: Path, run: str) -> list[dict[str, Any]]:
    """The curve so far, the trainer put where it ends; empty where nothing was kept of this very run."""
    if not kept.exists():
        return []
    state = torch.load(kept, weights_only=True)
    if state["run"] != run:
        return []
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    curve: list[dict[str, Any]] = state["curve"]
    return curve


@torch.no_grad()
def validate(trainer: Trainer, val: TokenStream, count: int | None) -> float:
    """Mean cross-entropy in nats over sequences of the val split, which share one id with the next: all or some."""
    length = settings.SEQ_LEN
    total = (len(val) - 1) // length
    chosen = range(total) if count is None or count >= total else [n * total // count for n in range(count)]
    summed = 0.0
    for first in range(0, len(chosen), _SEQUENCES_AT_ONCE):
        numbers = chosen[first : first + _SEQUENCES_AT_ONCE]
        rows = torch.stack([torch.from_numpy(val.read(number * length, length + 1)) for number in numbers])
        logits_BTV = trainer.logits(rows[:, :-1].contiguous())
        summed += float(functional.cross_entropy(logits_BTV.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return summed / (len(chosen) * length)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("raymill", "nanogpt"), required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--size", choices=tuple(settings.SIZES), default="race")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--points", type=int, help="validations on the way")
    parser.add_argument("--final-sequences", type=int, help="of the val split, at the end; all by default")
    parser.add_argument("--kept", type=Path, help="a file of the run's state at each validation, to go on from")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    size = settings.changed(settings.SIZES[options.size], options.learning_rate, options.batch_size, options.tokens)
    size = replace(size, points=options.points or size.points)
    made = train(options.side, size, options.shards, options.seed, options.final_sequences, options.kept)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
