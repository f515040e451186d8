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

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, peers, table
from benchmarks.measure import say
from benchmarks.training import feed, overhead, save, steps, workers
from benchmarks.training.bench import PINS, TORCH, Bench
from benchmarks.training.recipe import race

WORKS: dict[str, Callable[[Bench], list[table.Row]]] = {
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
    options = _options(arguments)
    began = time.monotonic()
    options.cache.mkdir(parents=True, exist_ok=True)
    ready = peers.ensure(options.cache, PINS, TORCH)
    facts = machine.describe(_LIBRARIES, ready.versions)
    rows: list[table.Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.cache) as work:
        for name in options.rows:
            say(f"{name} ...")
            folder = Path(work) / name
            folder.mkdir()
            rows += WORKS[name](Bench(ready, options.cache, folder, options.quick))
            machine.update(facts)
            if options.json is not None:
                table.save(rows, facts, options.json)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table.render(rows))
    print(f"\ntook {time.monotonic() - began:.0f} s")
    return 0 if all(row.ours is not None for row in rows) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 10 minutes")
    parser.add_argument("--rows", type=_row_names, default=list(WORKS), help=f"of {', '.join(WORKS)}; all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--cache", type=Path, default=home / "raymill-benchmarks", help="folder that is kept")
    return parser.parse_args(arguments)


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in WORKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no row; fix: name some of {', '.join(WORKS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
