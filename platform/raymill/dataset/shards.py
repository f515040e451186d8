"""Token shards: flat little-endian token ids on disk, memory-mapped by training.

    train-00000.bin  val-00000.bin   uint16 (vocabulary up to 65,536) or uint32 ids; each document ends with the
                                     end-of-document id, which no text can produce
    index.json                       dtype, vocab_size, end_of_document_id, bytes of text and tokens per shard

Concatenated in index order the shards of a split form one stream of tokens; a sequence may span two documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raymill.config import Config
from raymill.errors import ArtifactError, DataError

Split = Literal["train", "val"]
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
        self._maps = [_map_shard(folder / entry.path, self.index.dtype, entry.tokens) for entry in entries]
        self._starts = np.cumsum([0] + [entry.tokens for entry in entries])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Ids [start, start + count) as int64, across shard borders."""
        assert start >= 0 and start + count <= len(self), (start, count, len(self))
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = start - int(self._starts[shard])
        if offset + count <= len(self._maps[shard]):
            return self._maps[shard][offset : offset + count].astype(np.int64)
        pieces = []
        while count:
            piece = self._maps[shard][offset : offset + count]
            pieces.append(piece.astype(np.int64))
            count -= len(piece)
            shard, offset = shard + 1, 0
        return np.concatenate(pieces)


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


def _map_shard(path: Path, dtype: str, tokens: int) -> NDArray[np.unsignedinteger]:
    ids = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    if len(ids) != tokens:
        raise ArtifactError(
            f"{path} is damaged", why=f"{len(ids):,} ids, index says {tokens:,}", fix="delete its folder and run again"
        )
    return ids
