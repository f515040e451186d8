"""Token shards: flat little-endian token ids on disk, memory-mapped by training.

    train-00000.bin  val-00000.bin   uint16 (vocabulary up to 65,536) or uint32 ids; each document ends with the
                                     end-of-document id, which no text can produce
    train-00000.lengths.npy          uint32 ids per document, end-of-document id included
    train-00000.learn.bin            only where some ids are not to be learned: per id one byte, 0 or 1
    index.json                       dtype, vocab_size, end_of_document_id, bytes of text and tokens per shard

Concatenated in index order the shards of a split form one stream of tokens; a sequence may span two documents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raymill.config import Config
from raymill.errors import ArtifactError, DataError

Split = Literal["train", "val"]
PackingMethod = Literal["concat", "best_fit"]
INDEX = "index.json"


class ShardEntry(Config):
    """One shard file."""

    path: str
    """File name beside the index."""
    split: Split
    """Which split it belongs to."""
    documents: int
    """Documents in it."""
    tokens: int
    """Ids in it, end-of-document ids included."""
    text_bytes: int
    """UTF-8 bytes of the text they stand for, for bits per byte."""
    has_learn_mask: bool = False
    """Whether some of its ids are not to be learned, as the learn file beside it says."""


class ShardIndex(Config):
    """The token shards of one tokens artifact."""

    format: Literal[1] = 1
    """Version of this layout."""
    dtype: Literal["uint16", "uint32"]
    """Type of one id on disk, little-endian."""
    vocab_size: int
    """Ids are below this."""
    end_of_document_id: int
    """The id after every document."""
    shards: tuple[ShardEntry, ...]
    """In stream order."""

    def of(self, split: Split) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    def text_bytes(self, split: Split) -> int:
        return sum(shard.text_bytes for shard in self.of(split))


@dataclass(frozen=True)
class Place:
    """Where some ids that were trained on stand."""

    sequence: int
    """Number of their sequence in the split."""
    shard: str
    """Shard file."""
    token: int
    """The first of them, counted in ids from the start of the shard."""
    tokens: int
    """How many they are."""
    document: int | None
    """The document of the first, counted from the start of the shard; None where the shard has no lengths file."""


class TokenStream:
    """The ids of one split as one long read-only array over memory-mapped shards."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.index = read_index(folder)
        entries = self.index.of(split)
        if not entries:
            raise DataError(
                f"{folder} has no {split} tokens", fix="give prepare more text, or raise prepare.val_fraction"
            )
        self.split: Split = split
        self._folder = folder
        self._entries = entries
        self._maps = [map_ids(folder, entry, self.index.dtype) for entry in entries]
        self._masks = [map_learned(folder, entry) for entry in entries]
        self._starts = [0, *np.cumsum([entry.tokens for entry in entries]).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_shards(self) -> int:
        return len(self._entries)

    @property
    def has_learn_mask(self) -> bool:
        """Whether some ids are not to be learned."""
        return any(mask is not None for mask in self._masks)

    def check_vocabulary(self) -> None:
        """DataError when an id is outside the vocabulary. Reads every id: about 1 s for 5 GB in memory."""
        for entry, ids in zip(self._entries, self._maps, strict=True):
            highest = int(ids.max()) if len(ids) else 0
            if highest >= self.index.vocab_size:
                raise DataError(
                    f"{self._folder / entry.path} holds the id {highest}; the vocabulary has {self.index.vocab_size}",
                    why=f"it stands at token {int(ids.argmax())}",
                    fix="make the tokens again with raymill, or delete their folder and run the job",
                )

    def lengths(self, shard: int) -> NDArray[np.uint32]:
        """Ids per document of one shard. ArtifactError when the shard has no lengths, or they do not add up."""
        return map_lengths(self._folder, self._entries[shard])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Ids [start, start + count) as int64, across shard borders."""
        ids = np.empty(count, np.int64)
        self.read_into(start, ids)
        return ids

    def read_into(self, start: int, ids: NDArray[np.int64]) -> None:
        """Fills `ids` with those from position `start` on, across shard borders."""
        for shard, offset, part in self._pieces(start, len(ids)):
            ids[part] = self._maps[shard][offset : offset + part.stop - part.start]

    def learned(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of the ids [start, start + count) are to be learned."""
        learned = np.ones(count, np.bool_)
        for shard, offset, part in self._pieces(start, count):
            mask = self._masks[shard]
            if mask is not None:
                learned[part] = mask[offset : offset + part.stop - part.start]
        return learned

    def places(self, sequence: int, start: int, count: int) -> list[Place]:
        """Where the ids [start, start + count) of a sequence stand, shard by shard."""
        found = []
        for shard, offset, part in self._pieces(start, count):
            entry = self._entries[shard]
            document = None
            if (self._folder / lengths_name(entry.path)).exists():
                document = int(np.searchsorted(np.cumsum(self.lengths(shard), dtype=np.int64), offset, side="right"))
            found.append(Place(sequence, entry.path, offset, part.stop - part.start, document))
        return found

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, slice]]:
        """For every shard that [start, start + count) touches: its number, the offset in it, the part that it fills."""
        assert start >= 0 and start + count <= len(self), (start, count, len(self))
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < count:
            stop = min(count, self._starts[shard + 1] - start)
            yield shard, start + done - self._starts[shard], slice(done, stop)
            shard, done = shard + 1, stop


def read_index(folder: Path) -> ShardIndex:
    try:
        return ShardIndex.model_validate_json((folder / INDEX).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} holds no token shards", why=f"it has no {INDEX}", fix="name a tokenize artifact"
        ) from None


def id_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest id type for a vocabulary."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def lengths_name(shard: str) -> str:
    """The file of document lengths beside a shard file."""
    return str(Path(shard).with_suffix(".lengths.npy"))


def learn_name(shard: str) -> str:
    """The learn file beside a shard file."""
    return str(Path(shard).with_suffix(".learn.bin"))


def map_ids(folder: Path, entry: ShardEntry, dtype: str) -> NDArray[np.unsignedinteger]:
    """One shard's ids, memory-mapped. ArtifactError when the file has not the length the entry says."""
    return _map(folder / entry.path, np.dtype(dtype).newbyteorder("<"), entry.tokens)


def map_learned(folder: Path, entry: ShardEntry) -> NDArray[np.bool_] | None:
    """Which of one shard's ids are to be learned, memory-mapped; None: all."""
    if not entry.has_learn_mask:
        return None
    return _map(folder / learn_name(entry.path), np.dtype(np.uint8), entry.tokens).view(np.bool_)


def map_lengths(folder: Path, entry: ShardEntry) -> NDArray[np.uint32]:
    """One shard's ids per document, memory-mapped. ArtifactError when there are none, or they do not add up."""
    path = folder / lengths_name(entry.path)
    try:
        lengths: NDArray[np.uint32] = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} does not say where its documents begin",
            why=f"it has no {path.name}: an earlier version made it",
            fix="tokenize again, or set train.packing to concat",
        ) from None
    found = (len(lengths), int(lengths.sum(dtype=np.int64)))
    if found != (entry.documents, entry.tokens):
        why = f"{found[0]:,} documents of {found[1]:,} ids; index says {entry.documents:,} of {entry.tokens:,}"
        raise ArtifactError(f"{path} is damaged", why=why, fix="delete its folder and run again")
    return np.asarray(lengths)


def _map(path: Path, kind: np.dtype[Any], tokens: int) -> NDArray[Any]:
    # A plain array: slicing a memmap object costs 3 us, several times the copy of a sequence.
    ids = np.asarray(np.memmap(path, kind, "r"))
    if len(ids) != tokens:
        raise ArtifactError(
            f"{path} is damaged", why=f"{len(ids):,} ids, index says {tokens:,}", fix="delete its folder and run again"
        )
    return ids
