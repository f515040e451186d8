"""Lines or paragraphs that stand in many documents (menus, notices, licences): all but the first in the corpus are cut.

The first pass hashes the blocks of every document, clusters.find_repeats compares them over the corpus among the
documents that stay, the second pass cuts. After CCNet (Wenzek et al. 2020), which does this to paragraphs. Blocks under
`SHORTEST_BYTES` are never cut: headings and short answers repeat by right. Costs: 400 MB/s per core.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.measures import Bytes, Hashes

Unit = Literal["line", "paragraph"]
SHORTEST_BYTES = 30

_FNV_START = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0xD6E8FEB86659FD93)


def hash_blocks(data: bytes, unit: Unit) -> Hashes:
    """One hash per block that is long enough, in order; spread evenly over 64 bits."""
    text = np.frombuffer(data, np.uint8)
    return _hashes(text, _bounds(text, unit == "paragraph"))


def cut_blocks(data: bytes, unit: Unit, repeats: NDArray[np.bool_]) -> bytes:
    """The text without the blocks that are flagged; one flag for each hash of `hash_blocks`."""
    bounds = _bounds(np.frombuffer(data, np.uint8), unit == "paragraph")
    assert len(bounds) == len(repeats), (len(bounds), len(repeats))
    pieces, at = [], 0
    for start, end in bounds[repeats].tolist():
        pieces.append(data[at:start])
        at = end
    pieces.append(data[at:])
    return b"".join(pieces).strip(b"\n")


@njit(cache=True)
def _bounds(text: Bytes, paragraphs: bool) -> NDArray[np.int64]:
    """(first byte, byte behind it and its line ends) of every block that is long enough."""
    found = np.empty((len(text) // SHORTEST_BYTES + 1, 2), np.int64)
    count, start, size = 0, 0, len(text)
    while start < size:
        end = start
        while end < size and not (text[end] == 10 and (not paragraphs or end + 1 == size or text[end + 1] == 10)):
            end += 1
        behind = end
        while behind < size and text[behind] == 10:
            behind += 1
        if end - start >= SHORTEST_BYTES:
            found[count, 0], found[count, 1] = start, behind
            count += 1
        start = behind
    return found[:count]


@njit(cache=True)
def _hashes(text: Bytes, bounds: NDArray[np.int64]) -> Hashes:
    """White space at the ends of a block makes no difference."""
    hashes = np.empty(len(bounds), np.uint64)
    for index in range(len(bounds)):
        start, end = bounds[index, 0], bounds[index, 1]
        while start < end and text[start] <= 32:
            start += 1
        while end > start and text[end - 1] <= 32:
            end -= 1
        value = _FNV_START
        for place in range(start, end):
            value = (value ^ np.uint64(text[place])) * _FNV_PRIME
        value = (value ^ (value >> np.uint64(32))) * _MIX
        hashes[index] = value ^ (value >> np.uint64(32))
    return hashes
