"""Train or val, decided by a document's own hash: more input never moves a document to the other split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raymill.corpus.measures import Hashes


def choose_val(hashes: Sequence[Hashes], val_fraction: float) -> list[NDArray[np.bool_]]:
    """Per shard, True for the documents that go to val: about `val_fraction` of all, and at least one of two or more.

    hashes: per shard, the first 64 bits of each document's text hash. Not all documents go to val either.
    """
    val = [shard < np.uint64(val_fraction * 2**64) for shard in hashes]
    chosen = sum(int(flags.sum()) for flags in val)
    if sum(map(len, hashes)) < 2:
        return val
    if chosen == 0:
        lowest = min((int(shard.min()), number) for number, shard in enumerate(hashes) if len(shard))[1]
        val[lowest][np.argmin(hashes[lowest])] = True
    elif chosen == sum(map(len, hashes)):
        highest = max((int(shard.max()), number) for number, shard in enumerate(hashes) if len(shard))[1]
        val[highest][np.argmax(hashes[highest])] = False
    return val
