"""How often each piece of some texts occurs: what a vocabulary is learned from.

In: texts, in one pass, as many as there are. Out: the distinct pieces, the commonest first. Memory: 100 MB at most, for a
million distinct pieces; what is new after those is rare and not counted. Costs 30 MB/s per core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from raymill.tokenizer import kernel
from raymill.tokenizer.fast import CUTS, classes, empty_pieces
from raymill.tokenizer.flat import arrow, bytes_and_offsets

_MOST_PIECES = 1 << 20
_MOST_BYTES = 24 << 20
_BATCH_CHARS = 4 << 20


def count_pieces(texts: Iterable[str], pattern: str, chop_chars: int) -> list[tuple[bytes, int]]:
    """Pieces with their counts, by falling count, then by their bytes.

    pattern: one of the regular expressions of CUTS. chop_chars: a piece of more characters counts as several; 0: never.
    """
    pieces = empty_pieces(_MOST_PIECES, _MOST_BYTES, 1)
    counts = np.zeros(_MOST_PIECES, np.int64)
    for batch in _batches(texts):
        data, offsets = bytes_and_offsets(arrow(batch))
        kernel.count_pieces(data, offsets, classes(), CUTS[pattern], chop_chars, pieces, counts)
    entries = pieces.entries.reshape(-1, 4)[: pieces.used[0], :2].tolist()
    text = pieces.text.tobytes()
    found = [
        (text[start : start + length], count) for (start, length), count in zip(entries, counts.tolist(), strict=False)
    ]
    return sorted(found, key=lambda item: (-item[1], item[0]))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch
