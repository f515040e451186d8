"""Train or val, decided by a document's own hash: more input never moves a document to the other split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raymill.corpus.measures import Hashes


def choose_val(hashes: Hashes, val_fraction: float) -> NDArray[np.bool_]:
    """True for the documents that go to val: about `val_fraction` of them, and at least one of two or more.

    hashes: the first 64 bits of each document's text hash. Not all documents go to val either.
    """
    val = hashes < np.uint64(val_fraction * 2**64)
    if len(hashes) >= 2 and not val.any():
        val[np.argmin(hashes)] = True
    elif len(hashes) >= 2 and val.all():
        val[np.argmax(hashes)] = False
    return val
