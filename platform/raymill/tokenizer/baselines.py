"""What a model must beat on the held-out text: two figures in bits per byte, known before any training.

unigram    each token is guessed from how often it occurs in the train split, nothing else
zstd -19   a general compressor reading the held-out text itself
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import zstandard
from numpy.typing import NDArray

ZSTD_LIMIT_BYTES = 8 << 20


def unigram_bits_per_byte(train_counts: NDArray[np.int64], val_counts: NDArray[np.int64], val_text_bytes: int) -> float:
    """Bits that the val tokens cost under the train split's frequencies (each count plus one), per byte of val text."""
    bits = np.log2(train_counts.sum() + len(train_counts)) - np.log2(train_counts + 1)
    return float((val_counts * bits).sum() / val_text_bytes)


def zstd_bits_per_byte(texts: Iterable[str], level: int = 19) -> float:
    """Compressed bits per byte of the texts one after the other, at most the first 8 MiB of them (5 s)."""
    compressor = zstandard.ZstdCompressor(level=level).compressobj()
    read_bytes = packed_bytes = 0
    for text in texts:
        data = text.encode()[: ZSTD_LIMIT_BYTES - read_bytes]
        read_bytes += len(data)
        packed_bytes += len(compressor.compress(data))
        if read_bytes == ZSTD_LIMIT_BYTES:
            break
    packed_bytes += len(compressor.flush())
    return 8 * packed_bytes / read_bytes
