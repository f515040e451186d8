"""First pass over one input shard: its records are read, cleaned and judged, and those that may stay are signed.

    clean-N.parquet                documents, in reading order (table.py)
    clean-N.npy                    their signatures, one column per document (dedup.py)
    origins-N.npy                  hash of each one's text, or of the document it is a segment of: decides its split
    blocks-N.npy, lengths-N.npy    hashes of their lines or paragraphs and how many each document has (only if asked)
    quarantine-N.jsonl             records that hold no text
    clean-N.json                   the account; written last: where it lies the shard is done

Nothing depends on time, on order or on how many run at once, so neither do the bytes written. Memory: one row group (2 MiB
of text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.artifact import open_aside, write_atomic
from raymill.corpus.accounting import Account
from raymill.corpus.blocks import Unit, hash_blocks
from raymill.corpus.card import Lengths
from raymill.corpus.cleaning import Steps, clean, make_excerpt
from raymill.corpus.dedup import SIGNATURE_WIDTH, sign
from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.formats.unpack import REFUSALS
from raymill.corpus.limits import ReadLimits
from raymill.corpus.measures import Hashes
from raymill.corpus.readers import read
from raymill.corpus.segments import Segmentation, segment
from raymill.corpus.sources import InputShard, SourceFile
from raymill.corpus.table import Rows, describe_parts, open_writer, schema_of

Samples = dict[str, list[dict[str, Any]]]
"""A few dropped documents by reason."""
SAMPLES_PER_REASON = 5
_ROW_GROUP_BYTES = 2 << 20
_HASH_STEP_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """Everything the first pass depends on beside its input."""

    limits: ReadLimits
    steps: Steps
    segmentation: Segmentation | None
    near_duplicates: bool
    repeats: Unit | None
    """Which blocks are compared over the corpus."""
    kept_fields: tuple[str, ...]
    """Fields of records that become columns."""


def clean_shard(shard: InputShard, recipe: Recipe, folder: Path) -> None:
    """Reads, cleans, judges and signs one shard. Raises DataError when an input file changed since it was listed."""
    schema = schema_of(segments=recipe.segmentation is not None, kept=recipe.kept_fields)
    quarantine = open_aside(folder / f"quarantine-{shard.index:05d}.jsonl")
    parquet = open_aside(folder / f"clean-{shard.index:05d}.parquet")
    with (
        quarantine as quarantine_file,
        parquet as parquet_file,
        open_writer(parquet_file, schema, "lz4") as writer,  # read once more and thrown away: speed over size
    ):
        work = _Shard(recipe, quarantine_file, writer, Rows(schema))
        for file in shard.files:
            for record in read(file, recipe.limits):
                work.take(record)
            work.inputs.append((file.name, file.start, _hash_input(file)))
        work.write_rows()
    work.account.check()
    work.save(folder, shard.index)


class _Shard:
    """One shard's records on their way to one of three places."""

    def __init__(self, recipe: Recipe, quarantine: IO[bytes], writer: pq.ParquetWriter, rows: Rows) -> None:
        self.account = Account()
        self.inputs: list[tuple[str, int, str]] = []
        """Name, first byte and fingerprint of what was read."""
        self._samples: Samples = {}
        self._lengths = Lengths()
        self._signatures: list[Hashes] = []
        self._origins: list[int] = []
        self._blocks: list[Hashes] = []
        self._recipe = recipe
        self._quarantine = quarantine
        self._writer = writer
        self._rows = rows

    def take(self, record: Record) -> None:
        self.account.records += 1
        if isinstance(record, Unreadable):
            self.account.quarantined[record.reason] += 1
            self._quarantine.write(json.dumps(asdict(record)).encode() + b"\n")
            return
        self._lengths.add(len(record.text.encode("utf-8", "replace")))
        cleaned = clean(record, self._recipe.steps)
        self.account.changed.update(cleaned.changes)
        if cleaned.reason is not None:
            self.account.dropped[cleaned.reason] += 1
            excerpt = make_excerpt(cleaned, self._recipe.steps.pii)
            keep_sample(self._samples, {"id": record.id, "reason": cleaned.reason, "text": excerpt})
            return
        rows = list(self._pieces(cleaned.document))
        self.account.pieces += max(0, len(rows) - 1)
        if not rows:
            self.account.dropped["no_segment"] += 1
        origin = int(sign(cleaned.document.text.encode(), bands=False)[0]) if len(rows) > 1 else None
        for values in rows:
            self._keep(values | {"language": cleaned.language}, origin)

    def _pieces(self, document: Document) -> Iterator[dict[str, Any]]:
        """The document as the columns of its row, or of a row per segment; documents of parts are not cut."""
        values = {
            "id": document.id,
            "source": document.source,
            "kind": document.kind,
            "text": document.text,
            "parts": describe_parts(document.parts),
            **document.columns,
        }
        segmentation = self._recipe.segmentation
        if segmentation is None or document.parts:
            yield values
            return
        for piece in segment(document.text, segmentation):
            place = {"start_char": piece.start_char, "end_char": piece.end_char}
            name = f"{document.id}[{piece.start_char}:{piece.end_char}]"
            yield values | place | {"id": name, "text": piece.text}

    def _keep(self, values: dict[str, Any], origin: int | None) -> None:
        """origin: hash of the document that this is one of several segments of."""
        data, parts = values["text"].encode(), values["parts"]
        self.account.kept += 1
        if parts is None:
            signature = sign(data, bands=self._recipe.near_duplicates)
        else:  # tasks share their prompt, conversations their system turn: near says nothing, and who speaks counts
            signature = sign(data + json.dumps(parts).encode(), bands=False)
        self._signatures.append(signature)
        self._origins.append(int(signature[0]) if origin is None else origin)
        if self._recipe.repeats is not None:
            cut = parts is None and values["kind"] == "prose"  # a program without some of its lines is none
            self._blocks.append(hash_blocks(data if cut else b"", self._recipe.repeats))
        self._rows.add(values, len(data))
        if self._rows.text_bytes >= _ROW_GROUP_BYTES:
            self.write_rows()

    def write_rows(self) -> None:
        """The documents held so far become one row group."""
        if self._rows.text_bytes:
            self._writer.write_table(self._rows.take())

    def save(self, folder: Path, index: int) -> None:
        """Everything beside the documents; the account last."""
        signatures = np.array(self._signatures, np.uint64).reshape(-1, SIGNATURE_WIDTH)
        save_array(folder / f"clean-{index:05d}.npy", np.ascontiguousarray(signatures.T))
        save_array(folder / f"origins-{index:05d}.npy", np.array(self._origins, np.uint64))
        if self._recipe.repeats is not None:
            save_array(folder / f"blocks-{index:05d}.npy", np.concatenate([np.empty(0, np.uint64), *self._blocks]))
            lengths = np.array([len(blocks) for blocks in self._blocks], np.int64)
            save_array(folder / f"lengths-{index:05d}.npy", lengths)
        samples = [sample for group in self._samples.values() for sample in group]
        report = {
            "account": self.account.to_json(),
            "samples": samples,
            "lengths": self._lengths.to_json(),
            "inputs": self.inputs,
        }
        write_atomic(folder / f"clean-{index:05d}.json", json.dumps(report))


def is_clean(index: int, folder: Path) -> bool:
    return (folder / f"clean-{index:05d}.json").exists()


def _hash_input(file: SourceFile) -> str:
    """sha256 of a local range; of what an object store holds, the time of its last change.

    A file that cannot be read stands in the quarantine; it is no reason to end here.
    """
    if file.store is not None:
        return f"changed {file.mtime_ns}"
    digest = hashlib.sha256()
    left = file.range_bytes
    try:
        with Path(file.path).open("rb") as data:
            data.seek(file.start)
            while left and (step := data.read(min(left, _HASH_STEP_BYTES))):
                digest.update(step)
                left -= len(step)
    except REFUSALS as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()


def keep_sample(samples: Samples, sample: dict[str, Any]) -> None:
    """Adds a dropped document to those of its reason, if they are still few."""
    group = samples.setdefault(sample["reason"], [])
    if len(group) < SAMPLES_PER_REASON:
        group.append(sample)


def save_array(final: Path, array: NDArray[Any]) -> None:
    with open_aside(final) as file:
        np.save(file, array)
