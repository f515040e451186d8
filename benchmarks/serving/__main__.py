"""`python -m benchmarks.serving`: raymill's engine beside its peers, all sides measured in one run.

    python -m benchmarks.serving                      everything
    python -m benchmarks.serving --quick              the same rows with fewer rounds, in under 10 minutes
    python -m benchmarks.serving --rows large,memory  some of them: large, small, memory, start, http
    python -m benchmarks.serving --json FILE          also as a JSON list of rows

First use builds the peers' environments (llama.cpp is compiled: ten minutes and more) and makes two models of random
weights, exported to every peer; all of it stays in `~/.cache/raymill-benchmarks`. kernels.py beside this file measures the
native products alone.

How to read it: sides take turns (A B A B), each in a process of its own with two threads on two cores; figures are medians
over the rounds, spread is the distance of the quartiles over the median. Rates are by the clock, so what else ran on the
machine (its load) lowers all of them: read the ratio, ours over the best peer of the same run, or the other way round where
less is better. On a machine that is busy all the time threads wait for each other more than they work: `--threads 1` then
gives the engines' rates by CPU seconds on one core. A peer that cannot be had is named as missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import command
from benchmarks.peers import Peers
from benchmarks.serving import engines, process
from benchmarks.serving import http as api
from benchmarks.serving.bench import PINS, TORCH, Bench, ensure_vllm
from benchmarks.table import Row

WORKS: dict[str, Callable[[Bench], list[Row]]] = {
    "large": engines.large,
    "small": engines.small,
    "memory": process.memory,
    "start": process.start,
    "http": api.http,
}
_LIBRARIES = ("raymill", "numpy", "tokenizers", "safetensors", "ray", "uvicorn", "fastapi")


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser("benchmarks.serving", __doc__, WORKS, "fewer rounds")
    parser.add_argument("--threads", type=int, default=2, help="of every engine; 1: rates by CPU seconds, on one core")
    options = parser.parse_args(arguments)

    def prepare(ready: Peers) -> command.Work:
        vllm = ensure_vllm(options.cache)
        ready.versions.update(vllm.versions)

        def work(name: str, folder: Path) -> tuple[list[Row], str]:
            return WORKS[name](Bench(ready, vllm, options.cache, folder, options.quick, options.threads)), ""

        return work

    return command.run(options, prepare, _LIBRARIES, PINS, TORCH)


if __name__ == "__main__":
    sys.exit(main())
