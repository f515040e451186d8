"""A corpus is made in two passes over its input shards, each a plain function of one shard that writes its own files.

    clean_shard    input files -> clean-N.parquet (documents), clean-N.npy (signatures), quarantine-N.jsonl
    decide         every shard's signatures -> what stays, what goes where, and verdict-N.npy
    split_shard    clean-N.parquet and verdict-N.npy -> train-N.parquet, val-N.parquet

Each writes beside its goal and renames, its small json last: where that lies the shard is done, and a run that was killed
goes on behind it. Nothing here depends on time, on order or on how many run at once, so neither do the bytes written.
Memory: one row group (8 MiB of text) per shard at work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.artifact import open_aside, write_atomic
from raymill.corpus.accounting import Account
from raymill.corpus.dedup import SIGNATURE_WIDTH, find_duplicates, sign
from raymill.corpus.document import Record, Unreadable
from raymill.corpus.filters import Rules, judge
from raymill.corpus.measures import Hashes
from raymill.corpus.normalize import normalize
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import InputShard
from raymill.corpus.split import choose_val

SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("text", pa.large_string())])
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Samples = dict[str, list[dict[str, Any]]]
"""A few dropped documents by reason."""
_TRAIN, _VAL, _DROPPED = 0, 1, 2
_ROW_GROUP_BYTES = 8 << 20
_SAMPLES_PER_REASON = 5
_EXCERPT_CHARS = 300


@dataclass(frozen=True)
class Recipe:
    """Everything the first pass depends on beside its input."""

    limits: ReadLimits
    rules: Rules
    near_duplicates: bool


@dataclass(frozen=True)
class Decision:
    """What became of the records; per document it stands in the verdict files."""

    account: Account
    samples: list[dict[str, Any]]
    """A few dropped documents per reason."""


def clean_shard(shard: InputShard, recipe: Recipe, folder: Path) -> None:
    """First pass over one shard. Raises DataError when an input file changed since it was listed."""
    quarantine = open_aside(folder / f"quarantine-{shard.index:05d}.jsonl")
    parquet = open_aside(folder / f"clean-{shard.index:05d}.parquet")
    with quarantine as quarantine_file, parquet as parquet_file, _writer(parquet_file) as writer:
        cleaning = _Cleaning(recipe, quarantine_file, writer)
        for file in shard.files:
            for record in read(file, recipe.limits):
                cleaning.take(record)
        cleaning.write_rows()
    cleaning.account.check()
    signatures = np.array(cleaning.signatures, np.uint64).reshape(-1, SIGNATURE_WIDTH)
    _save_array(folder / f"clean-{shard.index:05d}.npy", signatures)
    samples = [sample for group in cleaning.samples.values() for sample in group]
    report = {"account": cleaning.account.to_json(), "samples": samples}
    write_atomic(folder / f"clean-{shard.index:05d}.json", json.dumps(report))


class _Cleaning:
    """One shard's records on their way to one of three places."""

    def __init__(self, recipe: Recipe, quarantine: IO[bytes], writer: pq.ParquetWriter) -> None:
        self.account = Account()
        self.samples: Samples = {}
        self.signatures: list[Hashes] = []
        self._recipe = recipe
        self._quarantine = quarantine
        self._writer = writer
        self._rows: list[dict[str, str]] = []
        self._held_bytes = 0

    def take(self, record: Record) -> None:
        self.account.records += 1
        if isinstance(record, Unreadable):
            self.account.quarantined[record.reason] += 1
            self._quarantine.write(json.dumps(asdict(record)).encode() + b"\n")
            return
        verdict = judge(normalize(record.text), record.kind, self._recipe.rules)
        self.account.removed_lines += verdict.removed_lines
        if verdict.reason is not None:
            self.account.dropped[verdict.reason] += 1
            excerpt = verdict.text[:_EXCERPT_CHARS]
            _keep_sample(self.samples, {"id": record.id, "reason": verdict.reason, "text": excerpt})
            return
        self.account.kept += 1
        data = verdict.text.encode()
        self.signatures.append(sign(data, bands=self._recipe.near_duplicates))
        self._rows.append({"id": record.id, "kind": record.kind, "text": verdict.text})
        self._held_bytes += len(data)
        if self._held_bytes >= _ROW_GROUP_BYTES:
            self.write_rows()

    def write_rows(self) -> None:
        """The documents held so far become one row group."""
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows, self._held_bytes = [], 0


def is_clean(index: int, folder: Path) -> bool:
    return (folder / f"clean-{index:05d}.json").exists()


def decide(shards: int, val_fraction: float, folder: Path) -> Decision:
    """Compares the signatures of every shard and writes each shard's verdicts."""
    account = Account()
    samples: Samples = {}
    for index in range(shards):
        report = json.loads((folder / f"clean-{index:05d}.json").read_bytes())
        account.add(Account.from_json(report["account"]))
        for sample in report["samples"]:
            _keep_sample(samples, sample)
    arrays = [np.load(folder / f"clean-{index:05d}.npy") for index in range(shards)]
    signatures = np.concatenate(arrays)
    starts = np.cumsum([0, *(len(array) for array in arrays)])
    duplicates = find_duplicates(signatures)
    everyone = np.arange(len(signatures))
    verdict = np.full(len(signatures), _DROPPED, np.uint8)
    ids = _IdLookup(folder, starts)
    for reason, originals in (("exact_duplicate", duplicates.exact), ("near_duplicate", duplicates.near)):
        copies = np.flatnonzero(originals != everyone)
        account.drop_kept(reason, len(copies))
        for copy in copies[:_SAMPLES_PER_REASON]:
            _keep_sample(samples, {"id": ids[copy], "reason": reason, "duplicate_of": ids[originals[copy]]})
    stays = np.flatnonzero((duplicates.exact == everyone) & (duplicates.near == everyone))
    verdict[stays] = np.where(choose_val(signatures[stays, 0], val_fraction), _VAL, _TRAIN)
    account.check()
    for index, (start, stop) in enumerate(pairwise(starts)):
        _save_array(folder / f"verdict-{index:05d}.npy", verdict[start:stop])
    return Decision(account, [sample for reason in sorted(samples) for sample in samples[reason]])


def split_shard(index: int, folder: Path, goal: Path) -> None:
    """Second pass over one shard: its documents that stay, in order, to a parquet file per split that has any."""
    verdict = np.load(folder / f"verdict-{index:05d}.npy")
    source = pq.ParquetFile(folder / f"clean-{index:05d}.parquet")
    counts: dict[str, dict[str, int]] = {}
    for code, split in enumerate(SPLITS):
        if not (verdict == code).any():
            continue
        documents, text_bytes, start = 0, 0, 0
        final = goal / f"{split}-{index:05d}.parquet"
        with open_aside(final, folder) as file, _writer(file) as writer:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group, use_threads=False)
                chosen = table.filter(pa.array(verdict[start : start + len(table)] == code))
                start += len(table)
                if len(chosen):
                    writer.write_table(chosen)
                    documents += len(chosen)
                    text_bytes += text_size(chosen)
        counts[split] = {"documents": documents, "text_bytes": text_bytes}
    write_atomic(folder / f"split-{index:05d}.json", json.dumps(counts))


def is_split(index: int, folder: Path) -> bool:
    return (folder / f"split-{index:05d}.json").exists()


def read_split_counts(shards: int, folder: Path) -> list[dict[str, Any]]:
    """One entry per file of the corpus, by split and then by shard: path, split, documents, text_bytes."""
    by_shard = [json.loads((folder / f"split-{index:05d}.json").read_bytes()) for index in range(shards)]
    return [
        {"path": f"{split}-{index:05d}.parquet", "split": split, **counts[split]}
        for split in SPLITS
        for index, counts in enumerate(by_shard)
        if split in counts
    ]


def join_quarantine(shards: int, folder: Path, final: Path) -> None:
    """Every shard's quarantine records in one file."""
    with open_aside(final, folder) as joined:
        for index in range(shards):
            joined.write((folder / f"quarantine-{index:05d}.jsonl").read_bytes())


def text_size(table: pa.Table) -> int:
    """UTF-8 bytes in the column `text`."""
    return int(pc.sum(pc.binary_length(table["text"])).as_py() or 0)


class _IdLookup:
    """Ids of documents by their index in the corpus; reads the id column of a shard when one of its ids is asked."""

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        self._folder = folder
        self._starts = starts
        self._columns: dict[int, Sequence[str]] = {}

    def __getitem__(self, document: Any) -> str:
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        if shard not in self._columns:
            path = self._folder / f"clean-{shard:05d}.parquet"
            self._columns[shard] = pq.read_table(path, columns=["id"])["id"].to_pylist()
        return self._columns[shard][int(document - self._starts[shard])]


def _keep_sample(samples: Samples, sample: dict[str, Any]) -> None:
    group = samples.setdefault(sample["reason"], [])
    if len(group) < _SAMPLES_PER_REASON:
        group.append(sample)


def _writer(file: IO[bytes]) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, SCHEMA, compression="zstd", use_dictionary=["kind"], write_statistics=False)


def _save_array(final: Path, array: NDArray[Any]) -> None:
    with open_aside(final) as file:
        np.save(file, array)
