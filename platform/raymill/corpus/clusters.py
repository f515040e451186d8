"""Which documents, and which lines and paragraphs, stood before: compared by their hashes, in bounded memory.

In come the signatures that every shard wrote (dedup.py), out come the documents to drop. Documents that share a band key
are linked, linked documents form a cluster, and its first in reading order stays, so the result does not depend on who
read what. Text never moves: only a key of 8 bytes and an index of 4 do, one band at a time and of a large corpus one
range of keys at a time. Memory: 5 bytes per document (a union-find of 32-bit indices, up to 4 billion documents) and
about 40 bytes per key of the range at work. Costs: about 0.1 us per key, 15 keys per document; every 4 million documents
are one more range, for which the bands are read once more (0.0008 us per key and range).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.dedup import SIGNATURE_WIDTH
from raymill.corpus.measures import Hashes

Indices = NDArray[np.uint32]
Flags = NDArray[np.bool_]
KEYS_AT_ONCE = 1 << 22
_TEXT_HASHES = 2  # the first columns of a signature; the others are band keys
_MOST_DOCUMENTS = 2**32 - 1


@dataclass(frozen=True)
class Duplicates:
    """Of every document, in reading order."""

    roots: Indices
    """The first document of its cluster; its own index when it stays."""
    exact: Flags
    """Its text is that of an earlier document."""

    @property
    def near(self) -> Flags:
        """Linked to an earlier document, and no exact copy."""
        return (self.roots != np.arange(len(self.roots), dtype=np.uint32)) & ~self.exact


def find_duplicates(signatures: Sequence[Hashes], keys_at_once: int = KEYS_AT_ONCE) -> Duplicates:
    """Compares all documents of all shards.

    signatures: per shard, in reading order, an array of SIGNATURE_WIDTH rows (a hash in two halves, then the band keys;
    key 0 is none) and one column per document; it may be memory-mapped.
    """
    count = sum(shard.shape[1] for shard in signatures)
    assert count <= _MOST_DOCUMENTS, f"{count} documents: more than the union-find can number"
    roots = np.arange(count, dtype=np.uint32)
    exact = np.zeros(count, np.bool_)
    second = [shard[1] for shard in signatures]
    for keys, positions in _ranges([shard[0] for shard in signatures], keys_at_once):
        others = _take(second, positions)
        order = np.lexsort((others, keys))
        keys, others, positions = keys[order], others[order], positions[order]
        copies = np.zeros(len(keys), np.bool_)
        copies[1:] = (keys[1:] == keys[:-1]) & (others[1:] == others[:-1])
        exact[positions[copies]] = True
        _link(roots, positions, copies)
    for band in range(_TEXT_HASHES, SIGNATURE_WIDTH):
        for keys, positions in _ranges([shard[band] for shard in signatures], keys_at_once):
            order = np.argsort(keys, kind="stable")
            keys, positions = keys[order], positions[order]
            same = np.zeros(len(keys), np.bool_)
            same[1:] = (keys[1:] == keys[:-1]) & (keys[1:] != 0)
            _link(roots, positions, same)
    return Duplicates(_resolve(roots), exact)


def cluster_sizes(found: Duplicates) -> dict[int, int]:
    """How many clusters of two or more documents there are, by the number of documents in them."""
    copies = found.roots[found.roots != np.arange(len(found.roots), dtype=np.uint32)]
    _, members = np.unique(copies, return_counts=True)
    sizes, clusters = np.unique(members + 1, return_counts=True)
    return dict(zip(sizes.tolist(), clusters.tolist(), strict=True))


def find_repeats(hashes: Sequence[Hashes], stays: Sequence[Flags], keys_at_once: int = KEYS_AT_ONCE) -> list[Flags]:
    """Per shard and hash: does an earlier one that stays have the same value? Those that do not stay never count."""
    repeats = [np.zeros(len(shard), np.bool_) for shard in hashes]
    starts = _starts(hashes)
    for keys, positions in _ranges(hashes, keys_at_once, stays):
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        again = np.sort(positions[1:][keys[1:] == keys[:-1]])
        cuts = np.searchsorted(again, starts)
        for shard, flags in enumerate(repeats):
            flags[again[cuts[shard] : cuts[shard + 1]] - starts[shard]] = True
    return repeats


def _starts(parts: Sequence[NDArray[np.generic]]) -> NDArray[np.int64]:
    return np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)


def _ranges(
    parts: Sequence[Hashes], keys_at_once: int, stays: Sequence[Flags] | None = None
) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """(keys, their positions in ascending order), one range of keys after the other; keys are spread evenly."""
    starts = _starts(parts)
    bits = max(0, (int(starts[-1]) - 1).bit_length() - (keys_at_once.bit_length() - 1))
    for bucket in range(1 << bits):
        keys, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, part in enumerate(parts):
            wanted = np.ones(len(part), np.bool_) if stays is None else stays[number]
            if bits:
                wanted = wanted & (part >> np.uint64(64 - bits) == bucket)
            places = np.flatnonzero(wanted)
            keys.append(part[places])
            positions.append(places + starts[number])
        yield np.concatenate(keys), np.concatenate(positions)


def _take(parts: Sequence[Hashes], positions: NDArray[np.int64]) -> Hashes:
    """The values at these positions, which ascend."""
    starts = _starts(parts)
    cuts = np.searchsorted(positions, starts)
    pieces = [part[positions[cuts[n] : cuts[n + 1]] - starts[n]] for n, part in enumerate(parts)]
    return np.concatenate([np.empty(0, np.uint64), *pieces])


@njit(cache=True)
def _root(roots: Indices, index: int) -> int:
    while roots[index] != index:
        roots[index] = roots[roots[index]]
        index = roots[index]
    return index


@njit(cache=True)
def _link(roots: Indices, documents: NDArray[np.int64], with_previous: Flags) -> None:
    """Joins each flagged document with the one before it. The smallest index of a cluster is its root."""
    for place in range(1, len(documents)):
        if with_previous[place]:
            one, other = _root(roots, documents[place - 1]), _root(roots, documents[place])
            roots[max(one, other)] = min(one, other)


@njit(cache=True)
def _resolve(roots: Indices) -> Indices:
    for index in range(len(roots)):
        roots[index] = _root(roots, index)
    return roots
