"""What every side of a comparison shares: it reads the same documents, warms up on some, times one pass over the rest.

A side is a script run by path, ours in our interpreter and a peer's in the peers'. Its `load(options)` returns the
function over a list of texts that is timed; imports, tables, compilers and caches are thus outside the time, for both
alike. One line of JSON comes out. With --results the result goes to a file, one JSON value per document, for comparing:
a reason with
a digest of the text that is left, or a digest of ids. Standard library only.
"""

import argparse
import array
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_DOCUMENTS = 64


def run(load: Callable[[argparse.Namespace], Callable[[list[str]], Any]]) -> None:
    options = _options()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    texts = read_texts(options.input, options.limit_mb)
    warm, timed = texts[:WARM_DOCUMENTS], texts[WARM_DOCUMENTS:]
    work = load(options)
    work(warm)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = work(timed)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    if options.results is not None:
        options.results.write_text(json.dumps([_comparable(each) for each in result]))
    size = sum(len(text.encode()) for text in timed)
    print(json.dumps({"cpu_s": cpu_s, "wall_s": wall_s, "bytes": size, "documents": len(timed)}))


def _comparable(each: Any) -> Any:
    """(reason, text) or ids, with a digest for what is long."""
    if isinstance(each, tuple):
        return each[0], _digest(each[1].encode())
    return _digest(array.array("I", each).tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def read_texts(paths: list[Path], limit_mb: float) -> list[str]:
    """Texts of the jsonl files, in order, until they hold `limit_mb`."""
    texts: list[str] = []
    left = limit_mb * 1e6
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for line in file:
                texts.append(json.loads(line)["text"])
                left -= len(texts[-1].encode())
                if left <= 0:
                    return texts
    return texts


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path, nargs="+")
    parser.add_argument("--limit-mb", type=float, required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--results", type=Path)
    return parser.parse_args()
