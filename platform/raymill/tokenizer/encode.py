"""Corpus files to files of ids: every document's ids, then the end-of-document id, one after the other.

A corpus file is parquet with a column `text`; its ids go to one flat little-endian file. Memory: one row group of text
and the ids of about 1 MiB of it. Costs: 3-4 MB/s per core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.artifact import open_aside, write_atomic
from raymill.tokenizer.bpe import Tokenizer

_BATCH_CHARS = 1 << 20


def read_texts(path: Path, column: str = "text") -> Iterator[str]:
    """One column of a corpus file, document by document."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=[column], use_threads=False)[column].to_pylist()


def sample_texts(paths: Sequence[Path], sample_bytes: int, text_bytes: int) -> Iterator[str]:
    """About `sample_bytes` of the `text_bytes` in these corpus files, whole documents chosen by the hash of their id."""
    limit = min(1.0, sample_bytes / max(1, text_bytes)) * 2**64
    for path in paths:
        for document_id, text in zip(read_texts(path, "id"), read_texts(path), strict=True):
            rank = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")
            if rank < limit:
                yield text


def encode_file(source: Path, tokenizer: Tokenizer, dtype: str, final: Path, folder: Path) -> None:
    """Writes the ids of one corpus file to `final`, how often each id occurs and a report to `folder`.

    dtype: uint16 or uint32, wide enough for the vocabulary. The report is written last: where it lies, all is done.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    documents = tokens = text_bytes = 0
    with open_aside(final, folder) as file:
        for batch in _batches(read_texts(source)):
            ids = _write_batch(batch, tokenizer, dtype, file)
            counts += np.bincount(ids, minlength=len(counts))
            documents += len(batch)
            tokens += len(ids)
            text_bytes += sum(len(text.encode()) for text in batch)
    with open_aside(folder / f"{final.name}.npy") as file:
        np.save(file, counts)
    report = {"path": final.name, "documents": documents, "tokens": tokens, "text_bytes": text_bytes}
    write_atomic(folder / f"{final.name}.json", json.dumps(report))


def read_report(name: str, folder: Path) -> dict[str, Any] | None:
    """What `encode_file` wrote about the file of this name; None: it is not done."""
    path = folder / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def read_counts(names: Sequence[str], folder: Path) -> NDArray[np.int64]:
    """How often each id occurs in these files together."""
    counts: NDArray[np.int64] = np.sum([np.load(folder / f"{name}.npy") for name in names], axis=0)
    return counts


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write_batch(batch: list[str], tokenizer: Tokenizer, dtype: str, file: IO[bytes]) -> NDArray[Any]:
    end = [tokenizer.end_id]
    ids = np.array([token for document in tokenizer.encode_batch(batch) for token in document + end], dtype)
    file.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    return ids
