"""`python -m benchmarks.training`: raymill's training beside its peers, both sides measured in one run.

    python -m benchmarks.training                      everything: about an hour on two calm cores
    python -m benchmarks.training --quick              the same rows with fewer rounds, in under 10 minutes
    python -m benchmarks.training --rows step,feed     some of them: race, step, int8, workers, platform, save, feed
    python -m benchmarks.training --json FILE          also as a JSON list of rows

First use builds the peers' environment (a minute, 2 GB) and makes token shards of this Python's standard library; both
stay in `~/.cache/raymill-benchmarks`. gpu.py beside this file measures GPUs; it is run on its own.

How to read it: sides take turns of a step (A B A B), each in a process of its own on one core with one thread; figures are
medians over the rounds, spread is the distance of the quartiles over the median. Rates are by CPU seconds where one core
works; `workers` and `platform` are wall seconds of the steps, starts left out. ratio is ours over the best peer, or the
other way round where less is better: above 1, ours is better. What else ran on the machine shows in its load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import command
from benchmarks.peers import Peers
from benchmarks.table import Row
from benchmarks.training import feed, overhead, save, steps, workers
from benchmarks.training.bench import PINS, TORCH, Bench
from benchmarks.training.recipe import race

WORKS: dict[str, Callable[[Bench], list[Row]]] = {
    "race": lambda bench: race.run(bench.quick, bench.cache),
    "step": steps.step,
    "int8": steps.int8,
    "workers": workers.workers,
    "platform": overhead.platform,
    "save": save.save,
    "feed": feed.feed,
}
_LIBRARIES = ("raymill", "torch", "ray", "numpy", "numba", "safetensors", "pydantic")


def main(arguments: list[str] | None = None) -> int:
    options = command.parser("benchmarks.training", __doc__, WORKS, "fewer rounds").parse_args(arguments)

    def prepare(peers: Peers) -> command.Work:
        def work(name: str, folder: Path) -> tuple[list[Row], str]:
            return WORKS[name](Bench(peers, options.cache, folder, options.quick)), ""

        return work

    return command.run(options, prepare, _LIBRARIES, PINS, TORCH)


if __name__ == "__main__":
    sys.exit(main())
