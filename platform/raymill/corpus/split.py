"""Train or val, decided by a document's own hash: more input moves no document to the other split.

Two exceptions keep both splits filled: where no hash is small enough, or all are, one document goes over. Segments are
decided by the hash of the document they were cut from, so that no text stands in both splits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raymill.corpus.measures import Hashes

Flags = NDArray[np.bool_]


def choose_val(hashes: Sequence[Hashes], stays: Sequence[Flags], val_fraction: float) -> list[Flags]:
    """Per shard, True for the documents that go to val: about `val_fraction` of those that stay, at least one of two.

    hashes: per shard, the first 64 bits of each document's text hash; they may be memory-mapped. Not all go to val either.
    """
    val = [(shard < np.uint64(val_fraction * 2**64)) & there for shard, there in zip(hashes, stays, strict=True)]
    total, chosen = (sum(int(np.count_nonzero(flags)) for flags in part) for part in (stays, val))
    if total < 2 or 0 < chosen < total:
        return val
    # The one with the smallest hash goes over, or comes back the one with the largest.
    ends = [
        (int(shard[there].min() if chosen == 0 else shard[there].max()), number)
        for number, (shard, there) in enumerate(zip(hashes, stays, strict=True))
        if there.any()
    ]
    value, number = min(ends) if chosen == 0 else max(ends)
    same = np.flatnonzero(stays[number] & (hashes[number] == np.uint64(value)))
    val[number][same if len(same) < total else same[0]] = chosen == 0
    return val
