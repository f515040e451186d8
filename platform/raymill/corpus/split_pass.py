"""Second pass over one shard: the documents that stay, in order, to a parquet file per split that has any.

Blocks that stood before are cut, and documents of the train split get their augmented copies behind them. The files have
the columns of table.py; split-N.json, written last, counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.artifact import open_aside, write_atomic
from raymill.corpus.augment import Augmentation, augment
from raymill.corpus.blocks import Unit, cut_blocks
from raymill.corpus.card import Lengths, Volume
from raymill.corpus.decision import TRAIN, VAL
from raymill.corpus.table import open_writer, text_size

Verdicts = NDArray[np.uint8]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
_CODES = {"train": TRAIN, "val": VAL}
_GROUPED = ["source", "kind", "language"]
Group = tuple[str, str, str | None]
"""Source, kind and language of documents."""


@dataclass(frozen=True)
class Finish:
    """What the second pass does beside writing."""

    repeats: Unit | None
    """The blocks that stood before are cut."""
    augmentation: Augmentation | None
    """Copies that the train split gets."""


@dataclass
class SplitReport:
    """What one shard, or all of them, gave to the corpus."""

    files: list[dict[str, Any]] = field(default_factory=list)
    """path, split, documents, copies (augmented ones among them), text_bytes."""
    groups: dict[Group, tuple[int, int]] = field(default_factory=dict)
    """Documents and bytes of text."""
    lengths: Lengths = field(default_factory=Lengths)

    def add_table(self, table: pa.Table) -> None:
        sizes = pc.binary_length(table["text"])
        for size in sizes.to_pylist():
            self.lengths.add(size)
        grouped = table.select(_GROUPED).append_column("size", sizes).group_by(_GROUPED, use_threads=False)
        for row in grouped.aggregate([("size", "count"), ("size", "sum")]).to_pylist():
            self._add_group(tuple(row[name] for name in _GROUPED), row["size_count"], row["size_sum"])

    def merge(self, other: SplitReport) -> None:
        self.files += other.files
        self.lengths.merge(other.lengths)
        for group, (documents, text_bytes) in other.groups.items():
            self._add_group(group, documents, text_bytes)

    def _add_group(self, group: Any, documents: int, text_bytes: int) -> None:
        before = self.groups.get(group, (0, 0))
        self.groups[group] = (before[0] + documents, before[1] + text_bytes)

    def volumes(self) -> dict[str, dict[str, Volume]]:
        """Documents and bytes by source, by kind and, where it was told, by language."""
        found: dict[str, dict[str, Volume]] = {}
        for group, (documents, text_bytes) in self.groups.items():
            for name, value in zip(_GROUPED, group, strict=True):
                if value is not None:
                    volumes = found.setdefault(name, {})
                    before = volumes.get(value, Volume(0, 0))
                    volumes[value] = Volume(before.documents + documents, before.text_bytes + text_bytes)
        return found

    def to_json(self) -> dict[str, Any]:
        groups = [[*group, *counts] for group, counts in sorted(self.groups.items(), key=lambda item: repr(item[0]))]
        return {"files": self.files, "groups": groups, "lengths": self.lengths.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SplitReport:
        groups: dict[Group, tuple[int, int]] = {tuple(row[:3]): (row[3], row[4]) for row in values["groups"]}
        return cls(list(values["files"]), groups, Lengths.from_json(values["lengths"]))


def split_shard(index: int, finish: Finish, folder: Path, goal: Path) -> None:
    """Writes `train-N.parquet` and `val-N.parquet` to `goal`, each where there is anything to write."""
    verdict = np.load(folder / f"verdict-{index:05d}.npy")
    report = SplitReport()
    for split in SPLITS:
        if (verdict == _CODES[split]).any():
            report.files.append(_write_split(index, split, verdict, finish, report, folder, goal))
    write_atomic(folder / f"split-{index:05d}.json", json.dumps(report.to_json()))


def is_split(index: int, folder: Path) -> bool:
    return (folder / f"split-{index:05d}.json").exists()


def read_split_reports(shards: int, folder: Path) -> SplitReport:
    """All shards together; files by split and then by shard."""
    whole = SplitReport()
    for index in range(shards):
        whole.merge(SplitReport.from_json(json.loads((folder / f"split-{index:05d}.json").read_bytes())))
    whole.files.sort(key=lambda file: (SPLITS.index(file["split"]), file["path"]))
    return whole


def join_quarantine(shards: int, folder: Path, final: Path) -> None:
    """Every shard's quarantine records in one file."""
    with open_aside(final, folder) as joined:
        for index in range(shards):
            joined.write((folder / f"quarantine-{index:05d}.jsonl").read_bytes())


def _write_split(
    index: int, split: Split, verdict: Verdicts, finish: Finish, report: SplitReport, folder: Path, goal: Path
) -> dict[str, Any]:
    source = pq.ParquetFile(folder / f"clean-{index:05d}.parquet")
    final = goal / f"{split}-{index:05d}.parquet"
    documents = copies = text_bytes = 0
    with open_aside(final, folder) as file, open_writer(file, source.schema_arrow, "zstd") as writer:
        for table in _chosen_rows(source, verdict == _CODES[split], index, finish.repeats, folder):
            added = _augmented_rows(table, finish.augmentation) if split == "train" else table.slice(0, 0)
            report.add_table(table)  # copies are counted by themselves: the card speaks of documents
            for part in (table, added):
                if len(part):
                    writer.write_table(part)
                    text_bytes += text_size(part)
            documents += len(table) + len(added)
            copies += len(added)
    return {
        "path": final.name, "split": split, "documents": documents, "copies": copies, "text_bytes": text_bytes,
    }  # fmt: skip


def _chosen_rows(
    source: pq.ParquetFile, chosen: NDArray[np.bool_], index: int, repeats: Unit | None, folder: Path
) -> Iterator[pa.Table]:
    """The chosen documents of each row group, without their repeated blocks."""
    start = 0
    blocks = _Cuts(index, repeats, folder) if repeats else None
    for group in range(source.num_row_groups):
        table = source.read_row_group(group, use_threads=False)
        flags = chosen[start : start + len(table)]
        rows = table.filter(pa.array(flags))
        if blocks is not None:
            places = start + np.flatnonzero(flags)
            texts = [blocks.cut(int(place), text) for place, text in zip(places, rows["text"].to_pylist(), strict=True)]
            column = rows.schema.get_field_index("text")
            rows = rows.set_column(column, rows.schema.field(column), pa.array(texts, pa.large_string()))
        start += len(table)
        if len(rows):
            yield rows


class _Cuts:
    """The repeated blocks of one shard."""

    def __init__(self, index: int, unit: Unit, folder: Path) -> None:
        self._unit = unit
        self._flags = np.load(folder / f"cut-{index:05d}.npy")
        self._starts = np.cumsum([0, *np.load(folder / f"lengths-{index:05d}.npy")])

    def cut(self, document: int, text: str) -> str:
        flags = self._flags[self._starts[document] : self._starts[document + 1]]
        return cut_blocks(text.encode(), self._unit, flags).decode() if flags.any() else text


def _augmented_rows(table: pa.Table, augmentation: Augmentation | None) -> pa.Table:
    """A row for every copy; documents of parts get none."""
    if augmentation is None:
        return table.slice(0, 0)
    copies = [
        row | {"id": f"{row['id']}{suffix}", "text": text}
        for row in table.to_pylist()
        if row["parts"] is None
        for suffix, text in augment(row["id"], row["text"], augmentation)
    ]
    return pa.Table.from_pylist(copies, table.schema)
