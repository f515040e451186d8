"""Best-fit packing at 2,048 targets beside concatenation, on the token lengths of real documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEQ_LEN = 2048


@dataclass(frozen=True)
class Outcome:
    documents: int
    tokens: int
    least_rows: int
    """Rows that any packing needs: all tokens over the length of a row, rounded up."""
    rows: int
    padding: float
    """Share of best-fit's positions that hold nothing."""
    cut: float
    """Share of the documents that would fit in a row and that best-fit cuts."""
    concat_cut: float
    """The same of concatenation."""


def measure(lengths: Sequence[int] | NDArray[np.int64]) -> Outcome:
    """lengths: ids of each document, its end-of-document id included."""
    from raymill.dataset.packing import pack_best_fit

    sizes = np.array(lengths, np.uint32)
    packing = pack_best_fit(sizes, SEQ_LEN)
    ends = np.cumsum(sizes.astype(np.int64))
    starts = ends - sizes
    fits = sizes <= SEQ_LEN
    whole = set(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    kept = sum((start, size) in whole for start, size in zip(starts[fits].tolist(), sizes[fits].tolist(), strict=True))
    could = max(1, int(fits.sum()))
    concat = int((starts // SEQ_LEN != (ends - 1) // SEQ_LEN)[fits].sum())
    tokens = int(ends[-1])
    return Outcome(
        documents=len(sizes),
        tokens=tokens,
        least_rows=-(-tokens // SEQ_LEN),
        rows=len(packing),
        padding=packing.padding,
        cut=(could - kept) / could,
        concat_cut=concat / could,
    )
