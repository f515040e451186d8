"""`python -m benchmarks.data`: raymill's data line beside its peers, both sides measured in one run.

    python -m benchmarks.data                      everything: about 20 minutes on two calm cores
    python -m benchmarks.data --quick              the same rows on less text, in under 10 minutes
    python -m benchmarks.data --rows filters,bpe   some of them: filters, minhash, bpe, packing, line
    python -m benchmarks.data --json FILE          also as a JSON list of rows
    python -m benchmarks.data --text PATH          on your own txt, md or jsonl files instead of this installation's text

First use builds the peers' environment (1-3 minutes, 1.6 GB), gathers paragraphs (1 minute) and makes the corpus; all of
it stays in `~/.cache/raymill-benchmarks`.

How to read it: MB are 10^6 bytes of UTF-8 text. The rows of one core are MB per CPU second of one thread in one process,
after a warm-up on other documents; the row of the whole line is MB per wall second and includes every start. Sides take
turns (A B A B); figures are medians over the rounds, spread is the distance of the quartiles over the median. Slow sides
get the first documents of the same corpus; the notes say how many MB. ratio is ours over the best peer (for memory and
cut documents the other way round): above 1, ours is better. What else ran on the machine shows in its load.
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
from benchmarks.data import kernels, line
from benchmarks.data.corpus import Library, build
from benchmarks.data.pins import PINS
from benchmarks.measure import say

WORKS: dict[str, Callable[[kernels.Bench], tuple[list[table.Row], str]]] = {
    "filters": kernels.filters,
    "minhash": kernels.minhash,
    "bpe": kernels.bpe,
    "packing": kernels.pack,
    "line": line.line,
}
_KERNELS_MB = 40.0
_LIBRARIES = ("raymill", "ray", "numba", "numpy", "pyarrow", "tokenizers")


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    cache = options.cache
    began = time.monotonic()
    ready = peers.ensure(cache, PINS)
    library = Library.load(cache, options.text)
    megabytes = max(_KERNELS_MB, line.largest_mb(options.quick) if "line" in options.rows else 0)
    say(f"corpus of {megabytes:.0f} MB ...")
    shards = build(library, megabytes, cache)
    facts = machine.describe(_LIBRARIES, ready.versions)
    rows: list[table.Row] = []
    texts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache) as work:
        rounds = 3 if options.quick else 5
        bench = kernels.Bench(ready, library, shards, cache, Path(work), rounds, options.quick)
        for name in options.rows:
            say(f"{name} ...")
            made, text = WORKS[name](bench)
            rows += made
            texts.append(text)
            machine.update(facts)
            if options.json is not None:
                table.save(rows, facts, options.json)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table.render(rows))
    print("\n".join(text for text in texts if text))
    print(f"\ntook {time.monotonic() - began:.0f} s")
    return 0 if all(row.ours is not None for row in rows) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less text and fewer rounds: under 10 minutes")
    parser.add_argument("--rows", type=_row_names, default=list(WORKS), help=f"of {', '.join(WORKS)}; all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--text", type=Path, metavar="PATH", help="make the corpus of these files instead")
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
