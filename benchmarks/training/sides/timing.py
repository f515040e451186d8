"""What the sides share: the protocol of benchmarks/turns.py, one thread on one core, CPU seconds of the whole process.

A side is a script run by path, ours in our interpreter and a peer's in the peers'. `serve(load)`: `load(options)` builds
everything and returns the facts of the side and the function of one turn, which is called `--warm` times first. Standard
library and torch only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FEEDS = 1000
"""Batches of one turn of the sides that only feed."""
Loaded = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""The facts of a side, and the function of one turn."""


class Turns:
    """This process's side of the talk. What a library prints goes to stderr."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        if options.core is not None:
            os.sched_setaffinity(0, {options.core})
        torch.set_num_threads(1)

    def say(self, value: dict[str, Any]) -> None:
        self._channel.write(json.dumps(value) + "\n")
        self._channel.flush()

    def wait(self) -> bool:
        """Until it is this side's turn; False when there are no more."""
        return bool(sys.stdin.readline())


def serve(load: Callable[[argparse.Namespace], Loaded]) -> None:
    options = read_options()
    turns = Turns(options)
    facts, work = load(options)
    loaded = resident_bytes("VmRSS")
    warm = [work() for _ in range(options.warm)]
    turns.say(facts | {"warm": warm, "loaded_bytes": loaded})
    while turns.wait():
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = work()
        turns.say({"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s} | result)
    turns.say({"peak_bytes": resident_bytes("VmHWM")})


def resident_bytes(name: str) -> int:
    """Of this process: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Batches:
    """The same sequences for every side: rows of seq_len + 1 ids of one file, a batch after the other, from the start again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows = np.load(options.ids, mmap_mode="r")
        self._batch_size = options.batch_size
        self._next = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs, targets: (batch_size, seq_len) int64."""
        first = self._next
        self._next = (first + self._batch_size) % (len(self.rows) - self._batch_size + 1)
        ids = torch.from_numpy(self.rows[first : first + self._batch_size].astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def describe(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, and operations of forward and backward per token, counted alike for every side.

    6 per weight of a matrix product (the tied head is one, the look-up none), 6 per layer, width and position for
    attention that sees half of the sequence.
    """
    products = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    products |= {id(weight): weight for weight in embeddings if weight.shape[0] == options.vocab_size}
    weights = sum(weight.numel() for weight in products.values())
    attention = 6 * options.layers * options.dim * options.seq_len
    return {"parameters": sum(each.numel() for each in model.parameters()), "flops_per_token": 6 * weights + attention}


def read_options() -> argparse.Namespace:
    return make_parser().parse_args()


def make_parser() -> argparse.ArgumentParser:
    """What most sides are given; one with needs of its own adds them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--variant", default="")
    return parser
