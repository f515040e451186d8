"""Tokenize on Ray: the artifact, the same bytes for any workers and after a cut-off attempt."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raymill.artifact import Artifact, Draft, open_artifact
from raymill.cluster.config import ClusterConfig, Role, Roles
from raymill.cluster.session import Cluster
from raymill.config import load
from raymill.dataset.shards import TokenStream, read_index
from raymill.errors import ConfigError
from raymill.stages import prepare, tokenize
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress
from raymill.tokenizer.tokenizer import Tokenizer
from raymill.tokenizer.training import SMALLEST_VOCAB

CONFIG = tokenize.Config(vocab_size=700)


class OneWorker:
    """The session's cluster with room for one data worker."""

    def __init__(self, cluster: Cluster) -> None:
        self.config = ClusterConfig(roles=Roles(data=Role(cpus_per_worker=cluster.local_cpus())))
        self.capacity = cluster.capacity
        self.connect = cluster.connect


def run_stage(run_folder: Path, corpus: Artifact, cluster: object, config: tokenize.Config = CONFIG) -> Artifact:
    run_folder.mkdir(exist_ok=True)
    draft = Draft(run_folder / "tokenize-00000000")
    return tokenize.run(config, Inputs({"corpus": corpus}, draft, run_folder, Progress("tokenize")), cluster)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def corpus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Twelve modules of the standard library, and one that spells the end of a document."""
    folder, run_folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("run")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("[a-c]*.py"))[:12]:
        shutil.copy(path, folder)
    (folder / "forged.py").write_text(
        "MARK = '<|endoftext|>'\n\n\ndef is_end(text: str) -> bool:\n"
        + " " * 4
        + "return text == MARK  # what <|endoftext|> and <|im_end|> are for, in one line\n"
    )
    config = prepare.Config(sources=(str(folder),), shard_mib=0.1, val_fraction=0.2)
    inputs = Inputs({}, Draft(run_folder / "prepare-00000000"), run_folder, Progress("prepare"))
    return prepare.run(config, inputs, cluster)


@pytest.fixture(scope="module")
def tokens(corpus: Artifact, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage(tmp_path_factory.mktemp("run"), corpus, cluster)


def content(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def test_the_streams_are_the_corpus(corpus: Artifact, tokens: Artifact) -> None:
    found = open_artifact(tokens.path, "tokens")
    tokenizer = Tokenizer.load(found.file("tokenizer.json"))
    files = corpus.json("index.json")["files"]
    for split in ("train", "val"):
        stream = TokenStream(found.path, split)
        ids = stream.read(0, len(stream))
        paths = [corpus.file(file["path"]) for file in files if file["split"] == split]
        documents = [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]
        ends = np.flatnonzero(ids == tokenizer.end_id)
        pieces = np.split(ids, ends + 1)[:-1]
        assert [tokenizer.decode(piece.tolist()) for piece in pieces] == documents
        assert read_index(found.path).text_bytes(split) == sum(len(text.encode()) for text in documents)


def test_the_figures(tokens: Artifact) -> None:
    index, figures = read_index(tokens.path), tokens.figures
    assert figures["vocab_size"] == index.vocab_size == 700
    assert (figures["train_tokens"], figures["val_tokens"]) == (index.tokens("train"), index.tokens("val"))
    assert 1.5 < figures["bytes_per_token"] < 5
    assert 1 < figures["zstd19_bits_per_byte"] < figures["unigram_bits_per_byte"] < 8
    assert "vocabulary 700, " in tokens.manifest.summary
    assert "unigram" in tokens.manifest.summary


def test_no_work_is_left(tokens: Artifact) -> None:
    shards = {shard.path for shard in read_index(tokens.path).shards}
    lengths = {f"{Path(shard).stem}.lengths.npy" for shard in shards}
    assert set(content(tokens)) == {"tokenizer.json", "index.json"} | shards | lengths


def test_one_worker_makes_the_same_bytes(corpus: Artifact, tokens: Artifact, cluster: Cluster, tmp_path: Path) -> None:
    assert content(run_stage(tmp_path / "run", corpus, OneWorker(cluster))) == content(tokens)


def test_a_cut_off_attempt_is_taken_up(
    corpus: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raymill.cluster.data

    class Killed(BaseException):
        pass

    done: list[str] = []

    def first_two(cluster: object, work: object, items: list[dict[str, str]]) -> object:
        for item in items[:2]:
            yield work(item)  # type: ignore[operator]
            if isinstance(item, dict):  # a file; the other item is the sample to learn from
                done.append(item["path"])
        if done:
            raise Killed

    monkeypatch.setattr(raymill.cluster.data, "map_items", first_two)
    with pytest.raises(Killed):
        run_stage(tmp_path / "run", corpus, None)

    def all_of(cluster: object, work: object, items: list[dict[str, str]]) -> object:
        assert len(done) == 2 and not {item["path"] for item in items} & set(done)
        return map(work, items)  # type: ignore[call-overload]

    monkeypatch.setattr(raymill.cluster.data, "map_items", all_of)
    assert content(run_stage(tmp_path / "run", corpus, None)) == content(tokens)


def test_a_vocabulary_beyond_the_text_is_smaller_and_says_so(
    corpus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raymill.cluster.data

    monkeypatch.setattr(raymill.cluster.data, "map_items", lambda cluster, work, items: map(work, items))
    made = run_stage(tmp_path / "run", corpus, None, tokenize.Config(vocab_size=900_000))
    size = made.figures["vocab_size"]
    assert 1000 < size < 65_536
    assert read_index(made.path).dtype == "uint16"
    assert f"vocabulary {size:,} (of 900,000: the text has no more repeated pieces)" in made.manifest.summary


def test_the_smallest_vocabulary_is_the_bound() -> None:
    assert tokenize.Config(vocab_size=SMALLEST_VOCAB).vocab_size == SMALLEST_VOCAB
    with pytest.raises(ConfigError, match="vocab_size"):
        load(tokenize.Config, None, [f"vocab_size={SMALLEST_VOCAB - 1}"])
