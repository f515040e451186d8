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

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import command
from benchmarks.data import kernels, line
from benchmarks.data.corpus import Library, build
from benchmarks.data.pins import PINS
from benchmarks.measure import say
from benchmarks.peers import Peers
from benchmarks.table import Row

WORKS: dict[str, Callable[[kernels.Bench], tuple[list[Row], str]]] = {
    "filters": kernels.filters,
    "minhash": kernels.minhash,
    "bpe": kernels.bpe,
    "packing": kernels.pack,
    "line": line.line,
}
_KERNELS_MB = 40.0
_LIBRARIES = ("raymill", "ray", "numba", "numpy", "pyarrow", "tokenizers")


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser("benchmarks.data", __doc__, WORKS, "less text and fewer rounds")
    parser.add_argument("--text", type=Path, metavar="PATH", help="make the corpus of these files instead")
    options = parser.parse_args(arguments)

    def prepare(peers: Peers) -> command.Work:
        library = Library.load(options.cache, options.text)
        megabytes = max(_KERNELS_MB, line.largest_mb(options.quick) if "line" in options.rows else 0)
        say(f"corpus of {megabytes:.0f} MB ...")
        shards = build(library, megabytes, options.cache)
        rounds = 3 if options.quick else 5

        def work(name: str, folder: Path) -> tuple[list[Row], str]:
            return WORKS[name](kernels.Bench(peers, library, shards, options.cache, folder, rounds, options.quick))

        return work

    return command.run(options, prepare, _LIBRARIES, PINS)


if __name__ == "__main__":
    sys.exit(main())
