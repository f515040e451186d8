"""Best-fit packing: which documents share a sequence, so that none is cut that fits and hardly a position is empty.

In: the documents' lengths. Out: rows of at most seq_len targets, each row some pieces of the token stream. A document of
at most seq_len ids is one piece; a longer one is cut into full sequences and a rest. Pieces go, longest first, into the
row with the least room that still holds them (best-fit decreasing; for language models Ding et al. 2024, "Fewer
Truncations Improve Language Modeling"). Rows are kept in one bucket per remaining room, and a binary tree over the
buckets finds the next one that is not empty: O(documents x log seq_len).

A piece of n ids is n targets, and the input before each: the id before it in its own document, or the end-of-document id
where the document begins. So every id of every document, end included, is predicted exactly once, and the first of a
document as a model is used: what it writes first follows an end-of-document id. A document takes as many positions as it
has ids, and the bits that a row's targets cost are the bits of all the text in it. Further back a target
sees its own document in its own row and nothing else: training keeps attention inside the loader's document numbers.

Costs: 6 M documents/s at 2,048 ids, 2 M at 131,072; the first use on a machine compiles for 6 s. Memory: 11 bytes per
piece and 4 per row (13 and 4 above 65,535 ids), at most 15 bytes per document that is not cut: 1 TB of text, 217 M
documents, is 2.7 GB in each training process at 3 documents a row. Shards are packed in groups of 4 M documents, or one
shard, so working memory stays at about 150 MB however many there are; a group's last rows are all that this costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.dataset.shards import TokenStream

Lengths = NDArray[np.uint32]

_GROUP_DOCUMENTS = 1 << 22


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row r holds pieces rows[r] to rows[r + 1], in that order."""

    seq_len: int
    """Targets a row has room for."""
    rows: NDArray[np.uint32]
    """First piece of each row, and the number of pieces at the end."""
    starts: NDArray[np.int64]
    """Position in the stream of each piece's first target."""
    lengths: NDArray[np.unsignedinteger]
    """Targets of each piece."""
    continues: NDArray[np.bool_]
    """Whether the piece goes on with a document that began in another row."""

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def padding(self) -> float:
        """Share of positions that hold nothing."""
        return 1 - int(self.lengths.sum(dtype=np.int64)) / max(1, len(self) * self.seq_len)

    def pieces(self, row: int) -> list[tuple[int, int, bool]]:
        """start, length, continues of the pieces of one row."""
        part = slice(int(self.rows[row]), int(self.rows[row + 1]))
        return list(
            zip(self.starts[part].tolist(), self.lengths[part].tolist(), self.continues[part].tolist(), strict=True)
        )

    def targets(self, row: int) -> int:
        """Positions of one row that hold something."""
        return int(self.lengths[int(self.rows[row]) : int(self.rows[row + 1])].sum(dtype=np.int64))


def pack_best_fit(lengths: Lengths, seq_len: int, first: int = 0) -> Packing:
    """Rows for documents that lie one after the other in the stream from position `first` on."""
    assert seq_len >= 1
    kind = np.uint16 if seq_len < 1 << 16 else np.uint32
    rows, starts, sizes, continues = _pack(np.ascontiguousarray(lengths, np.uint32), seq_len, first)
    return Packing(seq_len, rows, starts, sizes.astype(kind, copy=False), continues)


def pack_stream(stream: TokenStream, seq_len: int) -> list[Packing]:
    """Packs a split, neighbouring shards together. ArtifactError when its shards have no document lengths."""
    packed: list[Packing] = []
    waiting: list[Lengths] = []
    documents = first = 0
    for shard in range(stream.num_shards):
        waiting.append(stream.lengths(shard))
        documents += len(waiting[-1])
        if documents >= _GROUP_DOCUMENTS or shard == stream.num_shards - 1:
            packed.append(pack_best_fit(np.concatenate(waiting), seq_len, first))
            first += sum(int(lengths.sum(dtype=np.int64)) for lengths in waiting)
            waiting, documents = [], 0
    return packed


@njit(cache=True)
def _pack(lengths: Lengths, seq_len: int, first: int) -> tuple[Any, Any, Any, Any]:
    """rows, starts, lengths and continues of a Packing: the full sequences first, then rows of what is shorter."""
    full, order = _sort_rests(lengths, seq_len)
    row_of, filled = _place(lengths, order, seq_len)
    rows = np.zeros(full + filled + 1, np.uint32)
    rows[: full + 1] = np.arange(full + 1)
    for rank in range(len(order)):
        rows[full + 1 + row_of[rank]] += np.uint32(1)
    for row in range(full, full + filled):
        rows[row + 1] += rows[row]
    pieces = full + len(order)
    starts, sizes, continues = np.empty(pieces, np.int64), np.empty(pieces, np.uint32), np.zeros(pieces, np.bool_)
    rest_starts = np.empty(len(lengths), np.int64)
    at, piece = np.int64(first), 0
    for document in range(len(lengths)):
        length = np.int64(lengths[document])
        for number in range(length // seq_len):
            starts[piece], sizes[piece], continues[piece] = at + number * seq_len, seq_len, number > 0
            piece += 1
        rest_starts[document] = at + length // seq_len * seq_len
        at += length
    free = rows[full : full + filled].astype(np.int64)
    for rank in range(len(order)):
        document = order[rank]
        place = free[row_of[rank]]
        free[row_of[rank]] += 1
        length = np.int64(lengths[document])
        starts[place], sizes[place], continues[place] = rest_starts[document], length % seq_len, length > seq_len
    return rows, starts, sizes, continues


@njit(cache=True)
def _sort_rests(lengths: Lengths, seq_len: int) -> tuple[Any, NDArray[np.uint32]]:
    """How many full sequences there are; the documents with a shorter rest, longest rest first, ties in stream order."""
    full: Any = 0
    places = np.zeros(seq_len + 1, np.int64)
    for length in lengths:
        full += np.int64(length) // seq_len
        places[np.int64(length) % seq_len] += 1
    total: Any = 0
    for size in range(seq_len - 1, 0, -1):
        count = places[size]
        places[size] = total
        total += count
    order = np.empty(total, np.uint32)
    for document in range(len(lengths)):
        rest = np.int64(lengths[document]) % seq_len
        if rest:
            order[places[rest]] = document
            places[rest] += 1
    return full, order


@njit(cache=True)
def _place(lengths: Lengths, order: NDArray[np.uint32], seq_len: int) -> tuple[NDArray[np.uint32], int]:
    """Best fit: the row of each document's rest, and how many rows there are. A row is found by the room it has left."""
    leaves = 1
    while leaves < seq_len + 1:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.bool_)  # node n has children 2n and 2n + 1; leaf `leaves + room` is that bucket
    newest = np.full(seq_len + 1, -1, np.int64)  # per room, the row that got there last
    below = np.empty(len(order), np.uint32)  # per row, the one that got there before it (read while there is one)
    depth = np.zeros(seq_len + 1, np.int64)
    row_of = np.empty(len(order), np.uint32)
    rows = 0
    for rank in range(len(order)):
        rest = np.int64(lengths[order[rank]]) % seq_len
        room = _least_room(tree, leaves, rest)
        if room < 0:
            row, room = rows, seq_len
            rows += 1
        else:
            row = newest[room]
            depth[room] -= 1
            newest[room] = np.int64(below[row])
            if depth[room] == 0:
                _mark(tree, leaves + room, False)
        row_of[rank] = row
        left = room - rest
        if left:
            below[row] = newest[left] if depth[left] else 0
            newest[left] = row
            depth[left] += 1
            if depth[left] == 1:
                _mark(tree, leaves + left, True)
    return row_of, rows


@njit(cache=True)
def _least_room(tree: NDArray[np.bool_], leaves: int, rest: int) -> int:
    """The first bucket from `rest` on that holds a row; -1 when there is none."""
    node = leaves + rest
    while not tree[node]:
        while node & 1:  # a right child: what lies to the right hangs from a node further up
            node >>= 1
        if node == 0:
            return -1
        node += 1
    while node < leaves:
        node = 2 * node if tree[2 * node] else 2 * node + 1
    return node - leaves


@njit(cache=True)
def _mark(tree: NDArray[np.bool_], node: int, holds: bool) -> None:
    """Says whether a bucket holds a row, and lets the nodes above it know."""
    tree[node] = holds
    while node > 1 and (holds or not tree[node ^ 1]) and tree[node >> 1] != holds:
        node >>= 1
        tree[node] = holds
