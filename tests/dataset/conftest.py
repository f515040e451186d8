"""Token shards made of documents a test can tell apart."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream, learn_name, lengths_name

END = 0
Shards = Sequence[Sequence[Sequence[int]]]


def write_shards(
    folder: Path, shards: Shards, masks: Shards | None = None, *, split: str = "train"
) -> tuple[ShardEntry, ...]:
    """Shards of documents of ids (each must end with END itself, where it shall), with a 0/1 for every id if masked."""
    entries = []
    for number, documents in enumerate(shards):
        name = f"{split}-{number:05d}.bin"
        ids = np.concatenate([np.asarray(document) for document in documents])
        ids.astype("<u4").tofile(folder / name)
        np.save(folder / lengths_name(name), np.array([len(document) for document in documents], np.uint32))
        if masks is not None:
            np.concatenate([np.asarray(mask) for mask in masks[number]]).astype(np.uint8).tofile(
                folder / learn_name(name)
            )
        sizes = {"documents": len(documents), "tokens": len(ids), "text_bytes": 4 * len(ids)}
        entries.append(ShardEntry(path=name, split=split, has_learn_mask=masks is not None, **sizes))
    index = ShardIndex(dtype="uint32", vocab_size=1 << 20, end_of_document_id=END, shards=tuple(entries))
    (folder / INDEX).write_text(index.model_dump_json())
    return tuple(entries)


@pytest.fixture
def documents_of() -> Callable[[Sequence[int], int], list[list[int]]]:
    """`documents_of(lengths, first)`: documents whose ids, but for the ends, count up from `first`."""

    def make(lengths: Sequence[int], first: int) -> list[list[int]]:
        documents = []
        for length in lengths:
            documents.append([*range(first, first + length - 1), END])
            first += length - 1
        return documents

    return make


@pytest.fixture
def stream_of(tmp_path: Path) -> Callable[..., TokenStream]:
    """`stream_of(shards, masks)`: the stream of these documents."""

    def make(shards: Shards, masks: Shards | None = None) -> TokenStream:
        write_shards(tmp_path, shards, masks)
        return TokenStream(tmp_path, "train")

    return make
