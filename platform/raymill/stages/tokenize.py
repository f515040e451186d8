"""Tokenize: a corpus in, token shards out.

This process learns a byte-level BPE from a sample of the train split; then Ray Data encodes, one row = one corpus file.
What is done is kept: a run that was killed goes on with the files that are missing, and the result is the same to the
byte, whoever encodes what.

The artifact: tokenizer.json, train-*.bin and val-*.bin (see dataset/shards.py), index.json.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.artifact import Artifact, Kind, sweep_asides, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.dataset.shards import ShardIndex
    from raymill.tokenizer.bpe import Tokenizer

TAKES: tuple[Kind, ...] = ("corpus",)
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "tokens"
ROLE: RoleName = "data"
LIVE = False

_TOKENIZER = "tokenizer.json"


class Config(Settings):
    """How text becomes ids."""

    vocab_size: Annotated[int, Field(ge=259, le=1_000_000)] = 16384
    """Ids in the vocabulary at most: 3 special tokens, 256 bytes, and merges. A small corpus gives fewer."""
    sample_mib: Annotated[float, Field(gt=0, le=4096)] = 64
    """Text of the train split that the vocabulary is learned from, MiB."""


def demand(config: Config) -> Demand:
    """One worker is enough; it uses all the cluster has, and the result is the same."""
    return Demand(1)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Learns a vocabulary, encodes the corpus and publishes the tokens."""
    from raymill.dataset.shards import INDEX
    from raymill.tokenizer.bpe import Tokenizer

    corpus, goal = inputs["corpus"], inputs.draft.path
    work = inputs.draft.work
    sweep_asides(goal)
    if not (goal / _TOKENIZER).exists():
        _learn(config, corpus).save(goal / _TOKENIZER)
        inputs.draft.checkpoint_clock()
    tokenizer = Tokenizer.load(goal / _TOKENIZER)
    _encode(corpus, tokenizer, work, inputs, cluster)
    index = _index(corpus, tokenizer, work)
    figures = _figures(index, corpus, work)
    write_atomic(goal / INDEX, index.model_dump_json(indent=1) + "\n")
    return inputs.publish("tokenize", GIVES, config, _summary(config, figures), figures)


def _learn(config: Config, corpus: Artifact) -> Tokenizer:
    from raymill.tokenizer.bpe import Tokenizer
    from raymill.tokenizer.encode import sample_texts

    files = [file for file in corpus.json("stats.json")["files"] if file["split"] == "train"]
    text_bytes = sum(file["text_bytes"] for file in files)
    paths = [corpus.file(file["path"]) for file in files]
    return Tokenizer.train(sample_texts(paths, int(config.sample_mib * 2**20), text_bytes), config.vocab_size)


def _encode(corpus: Artifact, tokenizer: Tokenizer, work: Path, inputs: Inputs, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.dataset.shards import id_dtype
    from raymill.tokenizer.encode import read_report

    files = corpus.json("stats.json")["files"]
    missing = [file for file in files if read_report(_shard_name(file), work) is None]
    total_mb = sum(file["text_bytes"] for file in files) / 1e6
    done_mb = total_mb - sum(file["text_bytes"] for file in missing) / 1e6
    missing.sort(key=lambda file: (-file["text_bytes"], file["path"]))
    encode = partial(
        _encode_one,
        corpus=corpus.path.absolute(),
        goal=inputs.draft.path.absolute(),
        work=work.absolute(),
        dtype=id_dtype(tokenizer.vocab_size),
    )
    for text_bytes in map_items(cluster, encode, missing):
        done_mb += text_bytes / 1e6
        inputs.progress.update(done_mb, total_mb, "MB")
        inputs.draft.checkpoint_clock()


def _encode_one(file: dict[str, Any], corpus: Path, goal: Path, work: Path, dtype: str) -> int:
    from raymill.tokenizer.encode import encode_file

    encode_file(corpus / file["path"], _load(goal / _TOKENIZER), dtype, goal / _shard_name(file), work)
    text_bytes: int = file["text_bytes"]
    return text_bytes


@lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    """Once per worker, not once per file."""
    from raymill.tokenizer.bpe import Tokenizer

    return Tokenizer.load(path)


def _shard_name(file: dict[str, Any]) -> str:
    return str(Path(file["path"]).with_suffix(".bin"))


def _index(corpus: Artifact, tokenizer: Tokenizer, work: Path) -> ShardIndex:
    from raymill.dataset.shards import ShardEntry, ShardIndex, id_dtype
    from raymill.tokenizer.encode import read_report

    entries = []
    for file in corpus.json("stats.json")["files"]:
        report = read_report(_shard_name(file), work)
        assert report is not None and report["documents"] == file["documents"], (report, file)
        entries.append(ShardEntry(split=file["split"], **report))
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
    if figures["vocab_size"] < config.vocab_size:
        size += f" (of {config.vocab_size:,}: the text has no more repeated pieces)"
    return (
        f"vocabulary {size}, {figures['bytes_per_token']:.2f} bytes per token; "
        f"{figures['train_tokens']:,} train and {figures['val_tokens']:,} val tokens; bits per byte to beat: "
        f"unigram {figures['unigram_bits_per_byte']:.3f}, zstd -19 {figures['zstd19_bits_per_byte']:.3f}"
    )
