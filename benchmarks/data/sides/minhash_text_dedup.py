"""text-dedup's minhash embedding function, 14 x 8, word 5-grams, with the faster of its hashes and 32 bits."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import timing
from text_dedup.minhash import RNG, embed_func
from text_dedup.utils import xxh3_32hash

PERMUTATIONS, BANDS, ROWS = 112, 14, 8
MAX_HASH, PRIME = np.uint32((1 << 32) - 1), np.uint32((1 << 32) - 5)


def load(options: Namespace) -> Callable[[list[str]], Any]:
    settings = {
        "num_perm": PERMUTATIONS,
        "ngram_size": 5,
        "min_length": 5,
        "hashranges": [(band * ROWS, (band + 1) * ROWS) for band in range(BANDS)],
        "permutations": (
            RNG.randint(1, PRIME, size=PERMUTATIONS, dtype=np.uint32),
            RNG.randint(0, PRIME, size=PERMUTATIONS, dtype=np.uint32),
        ),
        "hash_func": xxh3_32hash,
        "dtype": np.uint32,
        "max_hash": MAX_HASH,
        "modulo_prime": PRIME,
    }
    return lambda texts: [embed_func(text, index, **settings) for index, text in enumerate(texts)]


timing.run(load)
