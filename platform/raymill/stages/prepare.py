"""Prepare: raw text in, clean documents out.

Ray Data makes two passes, one row = one input shard. The first reads, normalises, judges and signs; then this process
compares the signatures; the second writes the documents that stay to train and val. What is done is kept: a run that
was killed goes on with the shards that are missing, and the result is the same to the byte.

The artifact: train-*.parquet and val-*.parquet (columns id, kind, text), stats.json (counts, figures, files),
rejected.jsonl (a few dropped documents per reason), quarantine.jsonl (every record that could not be read).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from raymill.artifact import Artifact, Kind, discard, sweep_asides, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.corpus.sources import BUILTIN_PYTHON, InputShard, fingerprint, group, list_files
from raymill.errors import DataError
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.corpus.accounting import Account
    from raymill.corpus.passes import Recipe

TAKES: tuple[Kind, ...] = ()
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "corpus"
ROLE: RoleName = "data"
LIVE = False


class Config(Settings):
    """Where the text comes from and what is good enough to learn from."""

    sources: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (BUILTIN_PYTHON,)
    """`builtin:python`, or files, folders and globs of py, txt, md and jsonl, plain or .gz or .zst."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """The field of a jsonl record that holds its text."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of documents held out for validation; at least one document is."""
    segment_kib: Annotated[int, Field(ge=1, le=16384)] = 64
    """A txt or md file longer than this is cut at blank lines into documents of about this size, KiB."""
    max_document_mib: Annotated[float, Field(gt=0, le=256)] = 16
    """A longer record is quarantined, MiB."""
    quality_rules: bool = True
    """Drop documents by the Gopher and C4 rules for prose and ours for code; off: only empty ones are dropped."""
    min_words: Annotated[int, Field(ge=0, le=100_000)] = 50
    """Prose with fewer words is dropped as too_short."""
    drop_curly_brackets: bool = False
    """Drop prose that holds a curly bracket, C4's sign of code in a web page."""
    near_duplicates: bool = True
    """Drop documents that share about three of four word 5-grams with an earlier one."""
    shard_mib: Annotated[float, Field(gt=0, le=1024)] = 2
    """Input files are read in groups of about this size, MiB on disk; a larger file is read by one worker."""

    @model_validator(mode="after")
    def _segment_fits(self) -> Config:
        if 2 * self.segment_kib / 1024 > self.max_document_mib:
            raise ValueError(
                f"max_document_mib {self.max_document_mib:g} is under two segments of {self.segment_kib} KiB; "
                f"fix: raise it to at least {2 * self.segment_kib / 1024:g}"
            )
        return self


def demand(config: Config) -> Demand:
    """One worker is enough; it uses all the cluster has, and the result is the same."""
    return Demand(1)


def source_state(config: Config) -> Any:
    """Changes when a file is added, removed or written."""
    return fingerprint(list_files(config.sources))


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Reads the sources and publishes the corpus."""
    from raymill.corpus import passes

    listed = list_files(config.sources)
    shards = group(listed, int(config.shard_mib * 2**20))
    goal = inputs.draft.path
    work = inputs.draft.work
    _take_up(work, goal, fingerprint(listed))
    _clean(shards, _recipe(config), work, inputs, cluster)
    decision = passes.decide(len(shards), config.val_fraction, work)
    _check_enough(decision.account)
    _split(len(shards), work, inputs, cluster)
    if source_state(config) != fingerprint(listed):
        raise DataError("the sources changed while they were read", where="prepare", fix="run again")

    files = passes.read_split_counts(len(shards), work)
    written = sum(file["documents"] for file in files)
    assert written == decision.account.kept, f"{written} documents written, {decision.account.kept} were to be kept"
    passes.join_quarantine(len(shards), work, goal / "quarantine.jsonl")
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in decision.samples]
    write_atomic(goal / "rejected.jsonl", "".join(lines))
    figures = _figures(decision.account, files)
    stats = {"sources": list(config.sources), **figures, "files": files}
    write_atomic(goal / "stats.json", json.dumps(stats, indent=1) + "\n")
    return inputs.publish("prepare", GIVES, config, _summary(decision.account, figures), figures)


def _take_up(work: Path, goal: Path, state: str) -> None:
    """Keeps what an earlier attempt left if it read the same sources, else forgets it."""
    mark = work / "sources"
    sweep_asides(goal)
    if not (mark.exists() and mark.read_text() == state):
        discard(work)
        work.mkdir(mode=0o700)
        write_atomic(mark, state)


def _recipe(config: Config) -> Recipe:
    from raymill.corpus.filters import Rules
    from raymill.corpus.passes import Recipe
    from raymill.corpus.readers import ReadLimits

    return Recipe(
        ReadLimits(config.text_field, config.segment_kib * 1024, int(config.max_document_mib * 2**20)),
        Rules(config.quality_rules, config.min_words, config.drop_curly_brackets),
        config.near_duplicates,
    )


def _clean(shards: list[InputShard], recipe: Recipe, work: Path, inputs: Inputs, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.corpus.passes import is_clean

    missing = [shard for shard in shards if not is_clean(shard.index, work)]
    total_mb = sum(shard.size_bytes for shard in shards) / 1e6
    done_mb = total_mb - sum(shard.size_bytes for shard in missing) / 1e6
    # The largest first: a shard that is one large file would else be worked on alone at the end.
    missing.sort(key=lambda shard: (-shard.size_bytes, shard.index))
    for size_bytes in map_items(cluster, partial(_clean_one, recipe=recipe, work=work.absolute()), missing):
        done_mb += size_bytes / 1e6
        inputs.progress.update(done_mb, total_mb, "MB")
        inputs.draft.checkpoint_clock()


def _clean_one(shard: InputShard, recipe: Recipe, work: Path) -> int:
    from raymill.corpus.passes import clean_shard

    clean_shard(shard, recipe, work)
    return shard.size_bytes


def _split(shards: int, work: Path, inputs: Inputs, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.corpus.passes import is_split, split_shard

    missing = [index for index in range(shards) if not is_split(index, work)]
    goal = inputs.draft.path.absolute()
    for _ in map_items(cluster, partial(split_shard, folder=work.absolute(), goal=goal), missing):
        inputs.draft.checkpoint_clock()


def _check_enough(account: Account) -> None:
    if account.kept >= 2:
        return
    what = "no document is left" if account.kept == 0 else "one document is left; train and val need one each"
    raise DataError(what, where="prepare", why=f"of {account.records:,} records: {account.losses()}", fix=_fix(account))


def _fix(account: Account) -> str:
    """What most likely helps, by what took most of the records."""
    if not account.dropped and not account.quarantined:
        return "give more text; a text file becomes several documents when prepare.segment_kib is smaller"
    reason, _ = (account.dropped + account.quarantined).most_common(1)[0]
    return {
        "no_text_field": "set prepare.text_field to the field that holds the text",
        "not_utf8": "save the files as UTF-8",
        "too_short": "lower prepare.min_words, or give longer documents",
        "too_long": "raise prepare.max_document_mib, or cut the documents",
        "empty": "give files that hold text",
    }.get(reason, "give other text, or keep everything with prepare.quality_rules: false and near_duplicates: false")


def _figures(account: Account, files: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = {
        f"{split}_{name}": sum(file[name] for file in files if file["split"] == split)
        for split in ("train", "val")
        for name in ("documents", "text_bytes")
    }
    return {**account.to_json(), **sizes}


def _summary(account: Account, figures: dict[str, Any]) -> str:
    size_mb = (figures["train_text_bytes"] + figures["val_text_bytes"]) / 1e6
    return f"{account.kept:,} of {account.records:,} documents kept ({size_mb:.1f} MB); {account.losses()}"
