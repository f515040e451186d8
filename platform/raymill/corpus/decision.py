"""Between the passes: every shard's signatures and blocks are compared, and each document gets its place.

    verdict-N.npy   per document of the shard: 0 train, 1 val, 2 dropped
    cut-N.npy       per block: whether it stood before (only if asked)

One process does it; text is not read. Memory and costs: see clusters.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymill.corpus.accounting import Account
from raymill.corpus.card import Lengths
from raymill.corpus.clean_pass import SAMPLES_PER_REASON, Samples, keep_sample, save_array
from raymill.corpus.clusters import Duplicates, cluster_sizes, find_duplicates, find_repeats
from raymill.corpus.split import choose_val

TRAIN, VAL, DROPPED = 0, 1, 2


@dataclass(frozen=True)
class Decision:
    """What became of the records; per document it stands in the verdict files."""

    account: Account
    samples: list[dict[str, Any]]
    """A few dropped documents per reason."""
    lengths: Lengths
    """Sizes of the documents as they were read."""
    cluster_sizes: dict[int, int]
    """Groups of equal or similar documents, by how many documents they hold."""
    inputs: dict[str, str]
    """Fingerprint of every input file: its sha256, or that of its ranges' where several tasks read it."""


def decide(shards: int, val_fraction: float, folder: Path) -> Decision:
    """Compares the signatures of every shard and writes each shard's verdicts."""
    account, lengths = Account(), Lengths()
    samples: Samples = {}
    ranges: dict[str, list[tuple[int, str]]] = {}
    for index in range(shards):
        report = json.loads((folder / f"clean-{index:05d}.json").read_bytes())
        account.add(Account.from_json(report["account"]))
        lengths.merge(Lengths.from_json(report["lengths"]))
        for sample in report["samples"]:
            keep_sample(samples, sample)
        for name, start, fingerprint in report["inputs"]:
            ranges.setdefault(name, []).append((start, fingerprint))
    signatures = [np.load(folder / f"clean-{index:05d}.npy", mmap_mode="r") for index in range(shards)]
    starts = np.cumsum([0, *(shard.shape[1] for shard in signatures)])
    duplicates = find_duplicates(signatures)
    near = duplicates.near
    stays = ~(duplicates.exact | near)
    ids = _IdLookup(folder, starts)
    _drop_duplicates("exact_duplicate", duplicates.exact, duplicates, ids, account, samples)
    _drop_duplicates("near_duplicate", near, duplicates, ids, account, samples)
    if shards and (folder / "blocks-00000.npy").exists():
        empty = _cut_blocks(folder, stays, starts, account)
        stays &= ~empty
        account.drop_kept("only_repeats", int(empty.sum()))
        for place in np.flatnonzero(empty)[:SAMPLES_PER_REASON]:
            keep_sample(samples, {"id": ids[place], "reason": "only_repeats"})
    account.check()
    _write_verdicts(folder, starts, stays, val_fraction)
    ordered = [sample for reason in sorted(samples) for sample in samples[reason]]
    inputs = {name: _join(parts) for name, parts in ranges.items()}
    return Decision(account, ordered, lengths, cluster_sizes(duplicates), inputs)


def _join(ranges: list[tuple[int, str]]) -> str:
    if len(ranges) == 1:
        return ranges[0][1]
    return hashlib.sha256("".join(fingerprint for _, fingerprint in sorted(ranges)).encode()).hexdigest()


def _write_verdicts(folder: Path, starts: NDArray[np.int64], stays: NDArray[np.bool_], val_fraction: float) -> None:
    by_shard = np.split(stays, starts[1:-1])
    origins = [np.load(folder / f"origins-{index:05d}.npy", mmap_mode="r") for index in range(len(by_shard))]
    val = choose_val(origins, by_shard, val_fraction)
    for index, flags in enumerate(by_shard):
        verdict = np.where(flags, np.where(val[index], VAL, TRAIN), DROPPED)
        save_array(folder / f"verdict-{index:05d}.npy", verdict.astype(np.uint8))


def _drop_duplicates(
    reason: str, copies: NDArray[np.bool_], found: Duplicates, ids: _IdLookup, account: Account, samples: Samples
) -> None:
    account.drop_kept(reason, int(copies.sum()))
    for copy in np.flatnonzero(copies)[:SAMPLES_PER_REASON]:
        keep_sample(samples, {"id": ids[copy], "reason": reason, "duplicate_of": ids[found.roots[copy]]})


def _cut_blocks(
    folder: Path, stays: NDArray[np.bool_], starts: NDArray[np.int64], account: Account
) -> NDArray[np.bool_]:
    """Writes which blocks stood before; True for the documents that nothing else is in."""
    shards = len(starts) - 1
    counts = [np.load(folder / f"lengths-{index:05d}.npy") for index in range(shards)]
    hashes = [np.load(folder / f"blocks-{index:05d}.npy", mmap_mode="r") for index in range(shards)]
    inside = [np.repeat(stays[start:stop], counts[n]) for n, (start, stop) in enumerate(pairwise(starts))]
    repeats = find_repeats(hashes, inside)
    empty = np.zeros(len(stays), np.bool_)
    for index, flags in enumerate(repeats):
        save_array(folder / f"cut-{index:05d}.npy", flags)
        documents = np.repeat(np.arange(len(counts[index])), counts[index])
        repeated = np.bincount(documents[flags], minlength=len(counts[index]))
        nothing_else = (counts[index] > 0) & (repeated == counts[index])
        empty[starts[index] : starts[index + 1]] = nothing_else
        account.changed["repeated_blocks"] += int(repeated[~nothing_else].sum())
    return empty


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
