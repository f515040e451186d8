"""Tokenize: a corpus in, token shards out.

A worker learns a vocabulary from a sample of the train split, or one is brought; then Ray Data encodes, one row = one corpus
file; a mixture copies the documents it chose into new shards. What is done is kept: a run that was killed goes on with
the files that are missing, and the result is the same to the byte, whoever encodes what.

The artifact: tokenizer.json, train-*.bin and val-*.bin with lengths and masks (dataset/shards.py), index.json, mixture.json
(what became of each source, where there is a mixture).
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from raymill.artifact import Artifact, Kind, sha256_file, sweep_asides, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.dataset.mixture import Mixture
from raymill.errors import UsageError
from raymill.stages.contract import Demand, Inputs
from raymill.tokenizer.training import Model, smallest_vocab

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.dataset.mixture import MixedShard, MixPlan, ShardDocuments
    from raymill.dataset.shards import ShardEntry, ShardIndex
    from raymill.tokenizer.tokenizer import Tokenizer

TAKES: tuple[Kind, ...] = ("corpus",)
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "tokens"
ROLE: RoleName = "data"
LIVE = False

_TOKENIZER = "tokenizer.json"
_ENCODED = "encoded"
_MIXED_SHARD_TOKENS = 16 << 20


class Config(Settings):
    """How text becomes ids."""

    model: Model = "bpe"
    """What the vocabulary is made of: bpe, wordpiece, unigram (not the same twice), char, word; unknown text in bytes."""
    vocab_size: Annotated[int, Field(ge=259, le=1_000_000)] = 16384
    """Ids in the vocabulary at most: 3 special tokens, 256 bytes, and what is learned. A small corpus gives fewer."""
    sample_mib: Annotated[float, Field(gt=0, le=4096)] = 64
    """Text of the train split that the vocabulary is learned from, MiB."""
    tokenizer: Path | None = None
    """A tokenizer.json to use as it is, instead of learning one."""
    end_token: Annotated[str, Field(min_length=1)] | None = None
    """The token of that file that ends a document; without it, the well-known ones are looked for."""
    mixture: Mixture | None = None
    """How much of which source the train split holds; without it, everything once."""

    @model_validator(mode="after")
    def _vocabulary_is_possible(self) -> Config:
        if self.vocab_size < smallest_vocab(self.model):
            what = f"vocab_size {self.vocab_size} is too small for {self.model}"
            raise ValueError(f"{what}; fix: raise it to at least {smallest_vocab(self.model)}")
        return self


def demand(config: Config) -> Demand:
    """One worker is enough; it uses all the cluster has, and the result is the same."""
    return Demand(1)


def source_state(config: Config) -> Any:
    """Changes when the tokenizer that is brought does."""
    if config.tokenizer is None:
        return None
    if not config.tokenizer.is_file():
        fix = "name a tokenizer.json, or leave it out to learn one"
        raise UsageError(f"there is no tokenizer at {config.tokenizer}", where="tokenize.tokenizer", fix=fix)
    return sha256_file(config.tokenizer)


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Gets a vocabulary, encodes the corpus and publishes the tokens."""
    from raymill.dataset.mixture import check_column
    from raymill.dataset.shards import INDEX
    from raymill.tokenizer.tokenizer import Tokenizer

    corpus, goal, work = inputs["corpus"], inputs.draft.path, inputs.draft.work
    sweep_asides(goal)
    (work / _ENCODED).mkdir(exist_ok=True)
    if config.mixture is not None:
        check_column(corpus.file(_corpus_files(corpus)[0]["path"]), config.mixture)
    if not (goal / _TOKENIZER).exists():
        _get_tokenizer(config, corpus, goal / _TOKENIZER, cluster)
        inputs.draft.checkpoint_clock()
    tokenizer = Tokenizer.load(goal / _TOKENIZER)
    entries = _encode(config, corpus, tokenizer, inputs, cluster)
    if config.mixture is not None:
        entries = _mix(config.mixture, corpus, tokenizer, entries, inputs, cluster)
    index = _index(tokenizer, entries)
    figures = _figures(index, corpus, work)
    write_atomic(goal / INDEX, index.model_dump_json(indent=1) + "\n")
    return inputs.publish("tokenize", GIVES, config, _summary(config, figures), figures)


def _get_tokenizer(config: Config, corpus: Artifact, final: Path, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.tokenizer.tokenizer import Tokenizer

    if config.tokenizer is not None:
        Tokenizer.bring(config.tokenizer, config.end_token).save(final)
        return
    learn = partial(_learn, config=config, corpus=corpus.path.absolute(), final=final.absolute())
    for _ in map_items(cluster, learn, [_corpus_files(corpus, "train")]):
        pass


def _learn(files: list[dict[str, Any]], config: Config, corpus: Path, final: Path) -> None:
    from raymill.tokenizer.encode import sample_texts
    from raymill.tokenizer.tokenizer import Tokenizer

    text_bytes = sum(file["text_bytes"] for file in files)
    paths = [corpus / file["path"] for file in files]
    sample = sample_texts(paths, int(config.sample_mib * 2**20), text_bytes)
    Tokenizer.train(sample, config.vocab_size, config.model).save(final)


def _corpus_files(corpus: Artifact, split: str | None = None) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = corpus.json("index.json")["files"]
    return [file for file in files if split is None or file["split"] == split]


def _encode(
    config: Config, corpus: Artifact, tokenizer: Tokenizer, inputs: Inputs, cluster: Cluster
) -> list[ShardEntry]:
    """Encodes what is missing: to the artifact, or aside where a mixture takes from it."""
    from raymill.cluster.data import map_items
    from raymill.dataset.shards import id_dtype
    from raymill.tokenizer.encode import read_report

    goal, work = inputs.draft.path.absolute(), inputs.draft.work.absolute()
    files = _corpus_files(corpus)
    missing = [file for file in files if read_report(_shard_name(file), work) is None]
    total_mb = sum(file["text_bytes"] for file in files) / 1e6
    done_mb = total_mb - sum(file["text_bytes"] for file in missing) / 1e6
    missing.sort(key=lambda file: (-file["text_bytes"], file["path"]))
    encode = partial(
        _encode_one,
        corpus=corpus.path.absolute(),
        tokenizer=goal / _TOKENIZER,
        train_goal=work / _ENCODED if config.mixture is not None else goal,
        val_goal=goal,
        work=work,
        dtype=id_dtype(tokenizer.vocab_size),
    )
    for text_bytes in map_items(cluster, encode, missing):
        done_mb += text_bytes / 1e6
        inputs.progress.update(done_mb, total_mb, "MB")
        inputs.draft.checkpoint_clock()
    return [_entry(file["split"], _shard_name(file), work) for file in files]


def _encode_one(
    file: dict[str, Any], corpus: Path, tokenizer: Path, train_goal: Path, val_goal: Path, work: Path, dtype: str
) -> int:
    from raymill.tokenizer.encode import encode_file

    goal = train_goal if file["split"] == "train" else val_goal
    encode_file(corpus / file["path"], _load(tokenizer), dtype, goal / _shard_name(file), work)
    text_bytes: int = file["text_bytes"]
    return text_bytes


@lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    """Once per worker, not once per file."""
    from raymill.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(path)


def _shard_name(file: dict[str, Any]) -> str:
    return str(Path(file["path"]).with_suffix(".bin"))


def _entry(split: Any, name: str, work: Path) -> ShardEntry:
    from raymill.dataset.shards import ShardEntry
    from raymill.tokenizer.encode import read_report

    report = read_report(name, work)
    assert report is not None, name
    return ShardEntry(split=split, **{key: report[key] for key in ShardEntry.model_fields if key in report})


def _mix(
    mixture: Mixture,
    corpus: Artifact,
    tokenizer: Tokenizer,
    entries: list[ShardEntry],
    inputs: Inputs,
    cluster: Cluster,
) -> list[ShardEntry]:
    """Second pass: the train split is copied together from the encoded documents that the mixture chose."""
    from raymill.cluster.data import map_items
    from raymill.dataset.shards import id_dtype
    from raymill.tokenizer.encode import read_report

    goal, work = inputs.draft.path.absolute(), inputs.draft.work.absolute()
    train = [entry for entry in entries if entry.split == "train"]
    plan = _plan_mixture(mixture, corpus, train, work)
    names = [f"train-mixed-{number:05d}.bin" for number in range(len(plan.shards))]
    missing = [item for item in zip(names, plan.shards, strict=True) if read_report(item[0], work) is None]
    write = partial(
        _write_mixed,
        entries=train,
        goal=goal,
        work=work,
        dtype=id_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
    )
    for _ in map_items(cluster, write, missing):
        inputs.draft.checkpoint_clock()
    shares = {name: vars(share) for name, share in plan.shares.items()}
    report = {"by": mixture.by, "shares": shares, "left_out_documents": plan.left_out_documents}
    write_atomic(goal / "mixture.json", json.dumps(report, indent=1) + "\n")
    return [_entry("train", name, work) for name in names] + [entry for entry in entries if entry.split == "val"]


def _plan_mixture(mixture: Mixture, corpus: Artifact, train: list[ShardEntry], work: Path) -> MixPlan:
    from raymill.dataset.mixture import plan_mixture, read_documents
    from raymill.dataset.shards import map_lengths

    documents: list[ShardDocuments] = [
        read_documents(corpus.file(_corpus_name(entry.path)), map_lengths(work / _ENCODED, entry), mixture)
        for entry in train
    ]
    return plan_mixture(documents, mixture, _MIXED_SHARD_TOKENS)


def _write_mixed(
    item: tuple[str, MixedShard], entries: list[ShardEntry], goal: Path, work: Path, dtype: str, vocab_size: int
) -> None:
    from raymill.dataset.mixture import write_mixed_shard

    name, shard = item
    write_mixed_shard(shard, entries, work / _ENCODED, goal / name, work, dtype=dtype, vocab_size=vocab_size)


def _index(tokenizer: Tokenizer, entries: list[ShardEntry]) -> ShardIndex:
    from raymill.dataset.shards import ShardIndex, id_dtype

    return ShardIndex(
        dtype=id_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        end_of_document_id=tokenizer.end_id,
        shards=tuple(entries),
    )


def _figures(index: ShardIndex, corpus: Artifact, work: Path) -> dict[str, Any]:
    from raymill.tokenizer.baselines import unigram_bits_per_byte, zstd_bits_per_byte
    from raymill.tokenizer.encode import read_counts, read_texts

    train, val = ([shard.path for shard in index.of(split)] for split in ("train", "val"))
    train_counts, val_counts = read_counts(train, work), read_counts(val, work)
    val_texts = (text for name in val for text in read_texts(corpus.file(_corpus_name(name))))
    tokens = {split: index.tokens(split) for split in ("train", "val")}
    text_bytes = index.text_bytes("train") + index.text_bytes("val")
    return {
        "vocab_size": index.vocab_size,
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "bytes_per_token": text_bytes / (tokens["train"] + tokens["val"]),
        "unigram_bits_per_byte": unigram_bits_per_byte(train_counts, val_counts, index.text_bytes("val")),
        "zstd19_bits_per_byte": zstd_bits_per_byte(val_texts),
    }


def _corpus_name(shard: str) -> str:
    return str(Path(shard).with_suffix(".parquet"))


def _summary(config: Config, figures: dict[str, Any]) -> str:
    size = f"{figures['vocab_size']:,}"
    if config.tokenizer is not None:
        size += f" of {config.tokenizer}"
    elif figures["vocab_size"] < config.vocab_size:
        size += f" (of {config.vocab_size:,}: the text has no more repeated pieces)"
    return (
        f"vocabulary {size}, {figures['bytes_per_token']:.2f} bytes per token; "
        f"{figures['train_tokens']:,} train and {figures['val_tokens']:,} val tokens; bits per byte to beat: "
        f"unigram {figures['unigram_bits_per_byte']:.3f}, zstd -19 {figures['zstd19_bits_per_byte']:.3f}"
    )
