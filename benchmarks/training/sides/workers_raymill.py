"""The product's train() in one process or several, one thread each, over gloo: seconds of its steps as rank 0 meets them.

The first step is left out (memory is met for the first time there), and so are starts, validation and the last save.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from shape import shape
from timing import make_parser

from raymill.training.config import LayoutConfig, OptimizerConfig, TrainingConfig
from raymill.training.loop import Hooks, train
from raymill.training.parallel.worker import Worker


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    others = [_start(options, rank) for rank in range(1, options.workers)] if options.rank == 0 else []
    if options.workers > 1:
        rendezvous = f"file://{options.folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=options.rank, world_size=options.workers)
    ends: list[float] = []
    hooks = Hooks(
        validate=lambda *_: {"loss_nats": 0.0, "bits_per_byte": None, "accuracy": 0.0},
        on_step=lambda _: ends.append(time.perf_counter()),
    )
    worker = Worker.current(torch.device("cpu"))
    train(_config(options), options.tokens, options.folder / "run", worker, hooks)
    if options.workers > 1:
        dist.destroy_process_group()
    if any(other.wait() for other in others):
        raise RuntimeError("a worker failed")
    if options.rank == 0:
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        print(json.dumps({"step_s": seconds, "tokens": options.global_batch_size * options.seq_len}))


def _start(options: argparse.Namespace, rank: int) -> subprocess.Popen[bytes]:
    known = {name: value for name, value in vars(options).items() if value is not None}
    given = [part for name, value in known.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, __file__, *given, "--rank", str(rank)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _config(options: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        model=shape(options),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        layout=LayoutConfig(),
        steps=options.steps,
        global_batch_size=options.global_batch_size,
        microbatch_size=8,
        mask_documents=False,
        checkpoint_every_steps=options.steps,
        validate_every_steps=options.steps,
        validation_sequences=1,
    )


def _options() -> argparse.Namespace:
    parser = make_parser()
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-batch-size", type=int, required=True)
    options = parser.parse_args()
    if options.rank == 0:
        options.folder = options.folder / f"{options.workers}-{os.getpid()}"
        options.folder.mkdir(parents=True)
    return options


main()
