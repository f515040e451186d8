"""datasketch's MinHash over word 5-grams, 112 minima."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing
from datasketch import MinHash

SHINGLE_WORDS = 5


def shingles(text: str) -> list[bytes]:
    words = text.lower().split()
    grams = zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)
    return [" ".join(gram).encode() for gram in grams]


def load(options: Namespace) -> Callable[[list[str]], Any]:
    def work(texts: list[str]) -> Any:
        return [sketch.digest() for sketch in MinHash.bulk((shingles(text) for text in texts), num_perm=112)]

    return work


timing.run(load)
