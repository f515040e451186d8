"""What `python -m benchmarks.<part>` does for every part: rows by name, one after the other, then the table.

A part brings its works: by the name of a row, what measures it and gives rows of the table and what is told beneath it.
The peers' environment, the facts of the machine, the folder of the run, the JSON file and the exit code are here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks import machine, peers, table
from benchmarks.measure import say

Work = Callable[[str, Path], tuple[list[table.Row], str]]
"""The work of one name, in an empty folder of its own that is removed at the end of the run."""


def parser(package: str, page: str | None, names: Collection[str], quick: str) -> argparse.ArgumentParser:
    """--quick, --rows, --json and --cache; a part adds options of its own.

    `page`: the part's docstring, whose first line is told; `quick`: what is less then.
    """
    made = argparse.ArgumentParser(prog=f"python -m {package}", description=(page or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help=f"{quick}: under 10 minutes")
    made.add_argument(
        "--rows",
        type=lambda text: _row_names(text, names),
        default=list(names),
        help=f"of {', '.join(names)}; all of them",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made.add_argument("--cache", type=Path, default=home / "raymill-benchmarks", help="folder that is kept")
    return made


def run(
    options: argparse.Namespace,
    prepare: Callable[[peers.Peers], Work],
    libraries: Sequence[str],
    pins: peers.Pins,
    first: Sequence[str] = (),
) -> int:
    """The rows that the options name. 0 when each has a figure of ours, 1 otherwise.

    `prepare` makes what all works need. `libraries`: ours whose versions are told; `pins` and `first`: the peers'.
    """
    began = time.monotonic()
    options.cache.mkdir(parents=True, exist_ok=True)
    ready = peers.ensure(options.cache, pins, first)
    work = prepare(ready)
    facts = machine.describe(libraries, ready.versions)
    rows: list[table.Row] = []
    texts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.cache) as root:
        for name in options.rows:
            say(f"{name} ...")
            folder = Path(root) / name
            folder.mkdir()
            made, text = work(name, folder)
            rows += made
            texts.append(text)
            machine.update(facts)
            if options.json is not None:  # after each: a run that is broken off leaves what it has
                table.save(rows, facts, options.json)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    print("\n".join([table.render(rows), *filter(None, texts)]))
    print(f"\ntook {time.monotonic() - began:.0f} s")
    return 0 if all(row.ours is not None for row in rows) else 1


def _row_names(text: str, known: Collection[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no row; fix: name some of {', '.join(known)}")
    return names
