"""Mixing sources to an exact number of tokens: which documents, how often, in what order, copied into new shards.

In: per document its length, its source (or the value of another column) and a key, the hash of its id. Out: a plan, then
shards like those that came in. Of each source documents are taken whole in the order of a hash of (seed, pass, key) until
its share is reached; a source too small for its share is gone through again, in another order, as often as `max_repeats`
allows. All that was taken is then ordered by a second such hash, so sources and passes lie mixed, and neighbours differ
from pass to pass. Keys decide, not places: the same documents in other shards give the same stream of ids, and a larger
budget takes what a smaller one took and more.

The last document of a source is cut where its share is full: it keeps no end-of-document id, at most one such document
per source. In a stream cut by `concat` the next document follows it directly; best-fit rows know where it ends.

Costs: planning 3 M documents/s on one core in 70 bytes per document, so 15 GB for the 217 M documents of 1 TB; writing
500 MB/s of ids while the input is in the page cache, with one output shard in memory. Documents are read from all over
the input: it should lie on a disk that is fast at reads of 4 KB, such as the cluster's own, not in an object store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from raymill.artifact import open_aside, write_atomic
from raymill.config import Config
from raymill.dataset.shards import ShardEntry, learn_name, lengths_name, map_ids, map_learned
from raymill.errors import DataError

_BLOCK_IDS = 1 << 18

Keys = NDArray[np.uint64]
Counts = NDArray[np.uint32]
Numbers = NDArray[np.uint32]


class Mixture(Config):
    """How much of which source the train split holds."""

    weights: Annotated[dict[str, Annotated[float, Field(gt=0, strict=True)]], Field(min_length=1, max_length=10_000)]
    """Share of the tokens for each value of the column, in any unit; documents of other values are left out."""
    by: str = "source"
    """Column of the corpus whose values are weighted."""
    tokens: Annotated[int, Field(ge=1)]
    """Tokens of the train split, met exactly."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice and of the order of documents."""
    max_repeats: Annotated[int, Field(ge=1)] = 4
    """How often a document may be taken, so that a small source can fill its share."""

    def quotas(self) -> dict[str, int]:
        """Tokens for each value, in order of the values; they add up to `tokens` (largest remainders get the rest)."""
        names = sorted(self.weights)
        total = sum(Fraction(weight) for weight in self.weights.values())
        ideals = [self.tokens * Fraction(self.weights[name]) / total for name in names]
        quotas = [int(ideal) for ideal in ideals]
        by_rest = sorted(range(len(names)), key=lambda number: (quotas[number] - ideals[number], number))
        for number in by_rest[: self.tokens - sum(quotas)]:
            quotas[number] += 1
        return dict(zip(names, quotas, strict=True))


@dataclass(frozen=True)
class ShardDocuments:
    """What planning knows of the documents of one input shard, in its order: 14 bytes each."""

    lengths: NDArray[np.uint32]
    """Ids, end included."""
    groups: NDArray[np.int16]
    """Place of the document's value among the sorted values of the mixture; -1 for a value it does not name."""
    keys: Keys
    """Hash of the document's id."""


@dataclass(frozen=True)
class MixedShard:
    """One output shard: copies of documents, in order."""

    inputs: NDArray[np.uint32]
    """Number of each one's input shard."""
    starts: NDArray[np.int64]
    """Place of its first id in that shard."""
    lengths: NDArray[np.uint32]
    """Ids to copy."""


@dataclass(frozen=True)
class Share:
    """What became of one value of the column."""

    tokens: int
    """Tokens taken, repeats counted."""
    available_tokens: int
    """Tokens there are."""
    documents: int
    """Documents taken, repeats counted."""


@dataclass(frozen=True)
class MixPlan:
    """What to copy where."""

    shards: tuple[MixedShard, ...]
    shares: dict[str, Share]
    """By value of the column."""
    left_out_documents: int
    """Documents of values that the mixture does not name."""


def check_column(corpus_file: Path, mixture: Mixture) -> None:
    """DataError when a corpus file lacks the mixture's column."""
    names = pq.read_schema(corpus_file).names
    if mixture.by not in names:
        raise DataError(
            f"the corpus has no column {mixture.by}",
            why=f"{corpus_file.name} has {', '.join(names)}",
            fix="set the mixture's `by` to one of these, or let prepare keep the column",
        )


def read_documents(corpus_file: Path, lengths: NDArray[np.uint32], mixture: Mixture) -> ShardDocuments:
    """Reads ids and the mixture's column of a corpus file; `lengths` are those of the shard encoded from it."""
    check_column(corpus_file, mixture)
    table = pq.read_table(corpus_file, columns=list({"id", mixture.by}), use_threads=False)
    assert table.num_rows == len(lengths), (corpus_file, table.num_rows, len(lengths))
    numbers = {name: number for number, name in enumerate(sorted(mixture.weights))}
    values = table[mixture.by].to_pylist()
    found = (-1 if value is None else numbers.get(str(value), -1) for value in values)  # null is no name
    groups = np.fromiter(found, np.int16, len(values))
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in table["id"].to_pylist())
    keys = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
    return ShardDocuments(np.asarray(lengths, np.uint32), groups, keys)


def plan_mixture(shards: Sequence[ShardDocuments], mixture: Mixture, shard_tokens: int) -> MixPlan:
    """Chooses and orders documents, 4 billion at most; output shards hold about `shard_tokens` tokens.

    DataError, naming every source that is short, when `max_repeats` passes do not fill its share.
    """
    quotas = mixture.quotas()
    groups = np.concatenate([shard.groups for shard in shards])
    assert len(groups) < 1 << 32, len(groups)
    lengths = np.concatenate([shard.lengths for shard in shards])
    members = [np.flatnonzero(groups == number).astype(np.uint32) for number in range(len(quotas))]
    left_out = int((groups < 0).sum())
    del groups
    tokens = [int(lengths[each].sum(dtype=np.int64)) for each in members]
    _check_supply(mixture, quotas, dict(zip(quotas, tokens, strict=True)))
    keys = np.concatenate([shard.keys for shard in shards])
    taken: list[tuple[Numbers, Counts, Keys]] = []
    shares: dict[str, Share] = {}
    for each, have, (name, quota) in zip(members, tokens, quotas.items(), strict=True):
        parts = _take(each, lengths, keys, quota, mixture.seed)
        shares[name] = Share(quota, have, sum(len(part[0]) for part in parts))
        taken += parts
    del keys, members
    documents, counts = _order(taken)
    return MixPlan(_cut(shards, lengths, documents, counts, shard_tokens), shares, left_out)


def write_mixed_shard(
    shard: MixedShard,
    entries: Sequence[ShardEntry],
    source: Path,
    final: Path,
    folder: Path,
    *,
    dtype: str,
    vocab_size: int,
) -> None:
    """Copies one output shard's documents from the planned input shards, `entries` in `source`, to `final` and beside it.

    Counts of ids and a report go to `folder`, as for a shard that was encoded; the report is written last: where it
    lies, all is done. Bytes of text are known per shard: a part of a shard is given its part of them, by tokens.
    """
    ids, learned, text_bytes = _gather(shard, entries, source, dtype)
    with open_aside(final, folder) as file:
        file.write(ids.data)
    with open_aside(final.with_name(lengths_name(final.name)), folder) as file:
        np.save(file, shard.lengths)
    if learned is not None:
        with open_aside(final.with_name(learn_name(final.name)), folder) as file:
            file.write(learned.data)
    with open_aside(folder / f"{final.name}.npy") as file:
        np.save(file, _count(ids, vocab_size))
    report = {
        "path": final.name,
        "documents": len(shard.lengths),
        "tokens": len(ids),
        "text_bytes": text_bytes,
        "has_learn_mask": learned is not None,
    }
    write_atomic(folder / f"{final.name}.json", json.dumps(report))


def _gather(
    shard: MixedShard, entries: Sequence[ShardEntry], source: Path, dtype: str
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_] | None, int]:
    """The ids of one output shard, which of them are learned (None: the corpus has no mask), and their bytes of text."""
    total = int(shard.lengths.sum(dtype=np.int64))
    ids = np.empty(total, np.dtype(dtype).newbyteorder("<"))
    learned = np.ones(total, np.bool_) if any(entry.has_learn_mask for entry in entries) else None
    targets = np.cumsum(shard.lengths, dtype=np.int64) - shard.lengths
    order = np.lexsort((shard.starts, shard.inputs))  # through each input once, from its beginning to its end
    numbers, firsts = np.unique(shard.inputs[order], return_index=True)
    text_bytes = 0
    for number, rows in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
        entry = entries[number]
        copies = np.stack([targets[rows], shard.starts[rows], shard.lengths[rows].astype(np.int64)], axis=1).tolist()
        _copy(map_ids(source, entry, dtype), ids, copies)
        mask = map_learned(source, entry)
        if mask is not None and learned is not None:
            _copy(mask, learned, copies)
        text_bytes += entry.text_bytes * int(shard.lengths[rows].sum(dtype=np.int64)) // entry.tokens
    return ids, learned, text_bytes


def _count(ids: NDArray[np.unsignedinteger], vocab_size: int) -> NDArray[np.int64]:
    """How often each id occurs. In blocks: bincount makes 8 bytes of every id it is given."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(ids), _BLOCK_IDS):
        counts += np.bincount(ids[first : first + _BLOCK_IDS], minlength=vocab_size)
    return counts


def _copy(source: NDArray[np.generic], target: NDArray[np.generic], copies: list[list[int]]) -> None:
    for to, start, count in copies:
        target[to : to + count] = source[start : start + count]


def _check_supply(mixture: Mixture, quotas: dict[str, int], available: dict[str, int]) -> None:
    limits = {name: mixture.max_repeats * tokens for name, tokens in available.items()}
    short = [name for name, quota in quotas.items() if quota > limits[name]]
    if not short:
        return
    passes = "1 pass" if mixture.max_repeats == 1 else f"{mixture.max_repeats} passes"
    why = "; ".join(
        f"{name} is {quotas[name] - limits[name]:,} tokens short: its share is {quotas[name]:,}, "
        f"{passes} of its {available[name]:,} give {limits[name]:,}"
        for name in short
    )
    absent = [name for name in short if not available[name]]
    if absent:
        fix = f"no document has {mixture.by} {' or '.join(absent)}: correct the name, or take it out of the weights"
    else:
        total = sum(Fraction(weight) for weight in mixture.weights.values())
        most = min(int(limits[name] * total / Fraction(mixture.weights[name])) for name in short)
        repeats = max(-(-quotas[name] // available[name]) for name in short)
        fix = (
            f"lower the mixture's tokens to {most:,}, raise its max_repeats to {repeats}, "
            f"or give {' and '.join(short)} less weight or more text"
        )
    raise DataError(f"there is too little of {mixture.by} {' and '.join(short)} for the mixture", why=why, fix=fix)


def _take(members: Numbers, lengths: Counts, keys: Keys, quota: int, seed: int) -> list[tuple[Numbers, Counts, Keys]]:
    """Per pass over one source: the documents taken, their lengths, and the hash that places each in the order."""
    if not quota:
        return []
    passes, rest = divmod(quota, int(lengths[members].sum(dtype=np.int64)))
    parts = [(members, lengths[members], _hash(seed, "place", number, keys[members])) for number in range(passes)]
    if rest:
        order = members[np.argsort(_hash(seed, "choose", passes, keys[members]), kind="stable")]
        ends = np.cumsum(lengths[order], dtype=np.int64)
        last = int(np.searchsorted(ends, rest))
        chosen = order[: last + 1]
        counts = lengths[chosen]
        counts[-1] -= np.uint32(ends[last] - rest)
        parts.append((chosen, counts, _hash(seed, "place", passes, keys[chosen])))
    return parts


def _order(taken: list[tuple[Numbers, Counts, Keys]]) -> tuple[Numbers, Counts]:
    """All that was taken, by the hashes that place it. Empties `taken`: it is most of what a large plan holds."""
    order = np.argsort(np.concatenate([places for _, _, places in taken]), kind="stable")
    columns = [(documents, counts) for documents, counts, _ in taken]
    taken.clear()
    documents = np.concatenate([each for each, _ in columns])[order]
    return documents, np.concatenate([each for _, each in columns])[order]


def _cut(
    shards: Sequence[ShardDocuments], lengths: Counts, documents: Numbers, counts: Counts, shard_tokens: int
) -> tuple[MixedShard, ...]:
    """The ordered documents as output shards of nearly equal size."""
    first_documents = np.cumsum([0] + [len(shard.lengths) for shard in shards])
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths)[documents]
    inputs = (np.searchsorted(first_documents, documents, side="right") - 1).astype(np.uint32)
    starts -= np.concatenate([[0], ends])[first_documents][inputs]
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1])
    number = max(1, round(total / shard_tokens))
    borders = np.searchsorted(ends - counts, [total * index // number for index in range(number + 1)])
    parts = [slice(first, end) for first, end in pairwise(borders.tolist()) if first < end]
    return tuple(MixedShard(inputs[part], starts[part], counts[part]) for part in parts)


def _hash(seed: int, use: str, number: int, keys: Keys) -> Keys:
    """Another order for every seed, use and pass: a bijection of the keys (the finisher of splitmix64, Steele 2014)."""
    salt = int.from_bytes(hashlib.blake2b(f"{seed} {use} {number}".encode(), digest_size=8).digest(), "little")
    mixed = keys ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed
