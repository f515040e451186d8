"""What a model must beat on the held-out text: two figures in bits per byte, known before any training.

unigram    each token is guessed from how often it occurs in the train split, nothing else
zstd -19   a general compressor reading the held-out text itself
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import zstandard
from numpy.typing import NDArray

ZSTD_LIMIT_BYTES = 1 << 20


def unigram_bits_per_byte(train_counts: NDArray[np.int64], val_counts: NDArray[np.int64], val_text_bytes: int) -> float:
    """Bits that the val tokens cost under the train split's frequencies (each count plus one), per byte of val text."""
    bits = np.log2(train_counts.sum() + len(train_counts)) - np.log2(train_counts + 1)
    return float((val_counts * bits).sum() / val_text_bytes)


def zstd_bits_per_byte(texts: Iterable[str], level: int = 19) -> float:
    """Compressed bits per byte of the texts one after the other, at most the first 1 MiB of them (0.5 s, 25 MB)."""
    data = bytearray()
    for text in texts:
        data += text.encode()
        if len(data) >= ZSTD_LIMIT_BYTES:
            break
    del data[ZSTD_LIMIT_BYTES:]
    return 8 * len(zstandard.ZstdCompressor(level=level).compress(data)) / len(data)
