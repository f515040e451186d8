"""Fixtures every room may use: one Ray for the whole session, one small token set of real text."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raymill.artifact import Artifact, Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.config import Config
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress
from raymill.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig()) as c:
        c.connect()
        yield c


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tokens artifact of three modules of the standard library, vocabulary 300."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {"train": ["textwrap.py", "string.py"], "val": ["shlex.py"]}
    documents = {split: [(library / name).read_text() for name in names] for split, names in texts.items()}
    draft = Draft(tmp_path_factory.mktemp("run") / "tokenize-00000000")
    tokenizer = Tokenizer.train(documents["train"], 300)
    tokenizer.save(draft.path / "tokenizer.json")
    entries = []
    for split, split_texts in documents.items():
        ids = [token for text in split_texts for token in [*tokenizer.encode(text), tokenizer.end_id]]
        np.array(ids, "<u2").tofile(draft.path / f"{split}-00000.bin")
        text_bytes = sum(len(text.encode()) for text in split_texts)
        sizes = {"documents": len(split_texts), "tokens": len(ids), "text_bytes": text_bytes}
        entries.append(ShardEntry(path=f"{split}-00000.bin", split=split, **sizes))
    vocab_size = tokenizer.vocab_size
    index = ShardIndex(
        dtype="uint16", vocab_size=vocab_size, end_of_document_id=tokenizer.end_id, shards=tuple(entries)
    )
    (draft.path / INDEX).write_text(index.model_dump_json())
    figures = {"vocab_size": vocab_size, "unigram_bits_per_byte": 5.0, "zstd19_bits_per_byte": 2.0}
    return draft.publish("tokens", "tokenize", config=Config(), inputs={}, summary="", figures=figures)


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[..., Inputs]:
    """`inputs("train", tokens)`: what a stage of that name is given in the run folder tmp_path/run."""

    def make(stage: str, *artifacts: Artifact) -> Inputs:
        run_folder = tmp_path / "run"
        run_folder.mkdir(exist_ok=True)
        by_kind = {artifact.manifest.kind: artifact for artifact in artifacts}
        return Inputs(by_kind, Draft(run_folder / f"{stage}-00000000"), run_folder, Progress(stage))

    return make
