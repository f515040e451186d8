"""Corpus files to files of ids: every document's ids, then the end-of-document id, one after the other.

A corpus file is parquet with the columns id, source, text and, where documents have them, parts (role, end_byte, learn).
Its ids go to one flat little-endian file; beside it go how many ids each document has and, where not all is learned,
a 0 or 1 for each id. Parts are encoded each on its own, a part with a role as a turn of the chat template (chat.py).
Memory: one row group of text and the ids of about 4 MiB of it. Costs: 60 MB/s per core for plain documents, 20 for parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.artifact import open_aside, write_atomic
from raymill.tokenizer.chat import ChatTemplate
from raymill.tokenizer.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20

Ids = NDArray[Any]
Learn = NDArray[np.uint8]


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

    Beside `final` X.bin: X.lengths.npy, uint32 ids per document, and X.learn.bin, uint8 per id, only if some id is not
    learned. dtype: uint16 or uint32, wide enough for the vocabulary. The report is written last: where it lies, all is
    done.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    sources: dict[str, dict[str, int]] = {}
    lengths: list[NDArray[np.uint32]] = []
    masks = final.with_suffix(".learn.bin")
    masks.unlink(missing_ok=True)
    with ExitStack() as files:
        file = files.enter_context(open_aside(final, folder))
        mask = _Mask(masks, folder, files)
        for batch in _batches(source):
            ids, batch_lengths, learn = _encode_batch(batch, tokenizer)
            file.write(ids.astype(np.dtype(dtype).newbyteorder("<")).data)
            mask.write(learn, len(ids))
            counts += np.bincount(ids, minlength=len(counts))
            lengths.append(batch_lengths.astype(np.uint32))
            _count_sources(sources, batch, batch_lengths)
    with open_aside(final.with_suffix(".lengths.npy"), folder) as file:
        np.save(file, np.concatenate([np.empty(0, np.uint32), *lengths]))
    with open_aside(folder / f"{final.name}.npy") as file:
        np.save(file, counts)
    totals = {name: sum(each[name] for each in sources.values()) for name in ("documents", "tokens", "text_bytes")}
    report = {"path": final.name, **totals, "has_learn_mask": mask.written, "sources": dict(sorted(sources.items()))}
    write_atomic(folder / f"{final.name}.json", json.dumps(report))


def read_report(name: str, folder: Path) -> dict[str, Any] | None:
    """What `encode_file` wrote about the file of this name; None: it is not done."""
    path = folder / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def read_counts(names: Sequence[str], folder: Path) -> NDArray[np.int64]:
    """How often each id occurs in these files together."""
    counts: NDArray[np.int64] = np.load(folder / f"{names[0]}.npy")
    for name in names[1:]:
        counts += np.load(folder / f"{name}.npy")
    return counts


class _Mask:
    """The file of learned ids. It is opened by the first id that is not learned, all before it being learned."""

    def __init__(self, path: Path, folder: Path, files: ExitStack) -> None:
        self._path, self._folder, self._files = path, folder, files
        self._file: IO[bytes] | None = None
        self._learned_tokens = 0

    @property
    def written(self) -> bool:
        return self._file is not None

    def write(self, learn: Learn | None, tokens: int) -> None:
        """learn: None if all of the tokens are learned."""
        if learn is not None and self._file is None and not learn.all():
            self._file = self._files.enter_context(open_aside(self._path, self._folder))
            for start in range(0, self._learned_tokens, _BATCH_BYTES):
                self._file.write(b"\1" * min(_BATCH_BYTES, self._learned_tokens - start))
        if self._file is None:
            self._learned_tokens += tokens
        else:
            self._file.write((np.ones(tokens, np.uint8) if learn is None else learn).data)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A corpus file in pieces of about _BATCH_BYTES of text, cut between documents."""
    file = pq.ParquetFile(path)
    columns = [name for name in ("source", "text", "parts") if name in file.schema_arrow.names]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns, use_threads=False)
        for batch in table.combine_chunks().to_batches():
            ends = np.cumsum(pc.binary_length(batch["text"]).to_numpy(zero_copy_only=False))
            start = 0
            while start < batch.num_rows:
                before = ends[start - 1] if start else 0
                stop = max(start + 1, int(np.searchsorted(ends, before + _BATCH_BYTES)))
                yield batch.slice(start, stop - start)
                start = stop


def _encode_batch(batch: pa.RecordBatch, tokenizer: Tokenizer) -> tuple[Ids, NDArray[np.int64], Learn | None]:
    """The ids of all documents, how many each has, and which are learned (None: all)."""
    if "parts" not in batch.schema.names or batch["parts"].null_count == batch.num_rows:
        return (*tokenizer.encode_flat(batch["text"], close=True), None)
    texts: list[bytes] = batch["text"].cast(pa.large_binary()).to_pylist()
    parts: list[list[dict[str, Any]] | None] = batch["parts"].to_pylist()
    pieces = [piece for text, own in zip(texts, parts, strict=True) for piece in _cut(text, own)]
    ids, lengths = tokenizer.encode_flat(pa.array(pieces, pa.large_string()))
    return _assemble(parts, np.split(ids, np.cumsum(lengths)[:-1]), tokenizer)


def _cut(text: bytes, parts: list[dict[str, Any]] | None) -> list[bytes]:
    if not parts:
        return [text]
    ends = [part["end_byte"] for part in parts]
    assert ends[-1] == len(text), "the parts must tile the text"
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _assemble(
    parts: list[list[dict[str, Any]] | None], pieces: list[Ids], tokenizer: Tokenizer
) -> tuple[Ids, NDArray[np.int64], Learn]:
    """The documents' ids out of those of their pieces, with the control ids around turns and the end of each document."""
    template = ChatTemplate(tokenizer)
    runs: list[Any] = []
    learned: list[NDArray[np.uint8]] = []
    lengths = np.zeros(len(parts), np.int64)

    def add(ids: Any, learn: bool) -> int:
        runs.append(ids)
        learned.append(np.full(len(ids), learn, np.uint8))
        return len(ids)

    remaining = iter(pieces)
    for row, own in enumerate(parts):
        for part in own or [{"role": None, "learn": True}]:
            content = next(remaining)
            if part["role"] is None:
                lengths[row] += add(content, part["learn"])
                continue
            lengths[row] += add(template.header(part["role"]), learn=False)
            lengths[row] += add(content, part["learn"]) + add(template.tail[:1], part["learn"])
            lengths[row] += add(template.tail[1:], learn=False)
        lengths[row] += add([tokenizer.end_id], learn=True)
    return np.concatenate(runs).astype(np.uint32), lengths, np.concatenate(learned)


def _count_sources(sources: dict[str, dict[str, int]], batch: pa.RecordBatch, lengths: NDArray[np.int64]) -> None:
    text_bytes = pc.binary_length(batch["text"]).to_numpy(zero_copy_only=False)
    if "source" not in batch.schema.names:
        names, codes = [""], np.zeros(batch.num_rows, np.int64)
    else:
        encoded = batch["source"].dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)
    for code, name in enumerate(names):
        rows = codes == code
        found = sources.setdefault(name, {"documents": 0, "tokens": 0, "text_bytes": 0})
        found["documents"] += int(rows.sum())
        found["tokens"] += int(lengths[rows].sum())
        found["text_bytes"] += int(text_bytes[rows].sum())
