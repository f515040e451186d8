"""rensa's R-MinHash over word 5-grams, 112 minima, by its batch call."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing
from rensa import RMinHash

SHINGLE_WORDS = 5


def shingles(text: str) -> list[str]:
    words = text.split()
    return list(map(" ".join, zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)))


def load(options: Namespace) -> Callable[[list[str]], Any]:
    def work(texts: list[str]) -> Any:
        return RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], num_perm=112, seed=42)

    return work


timing.run(load)
