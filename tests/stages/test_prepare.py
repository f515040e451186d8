"""Prepare on Ray: the artifact, the same bytes for any workers and after kill -9, and errors that help."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raymill.artifact import Artifact, Draft, open_artifact
from raymill.cluster.config import ClusterConfig, Role, Roles
from raymill.cluster.session import Cluster
from raymill.config import load
from raymill.errors import ConfigError, DataError
from raymill.stages import prepare
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress

WORDS = ["river", "mountain", "teacher", "window", "garden", "letter", "market", "engine"]
WORDS += ["winter", "village", "the", "of", "and", "to", "with", "have"]
ONE_MODULE = "def f(number):\n    # Twice the number and one more, as the old table has it\n    return 2 * number + 1\n\nprint(f(4))\n"


class OneWorker:
    """The session's cluster with room for one data worker."""

    def __init__(self, cluster: Cluster) -> None:
        self.config = ClusterConfig(roles=Roles(data=Role(cpus_per_worker=cluster.local_cpus())))
        self.capacity = cluster.capacity
        self.connect = cluster.connect


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 files of text no rule objects to, a copy, and a file that is no text."""
    folder = tmp_path_factory.mktemp("sources")
    draw = random.Random(0)
    for number in range(24):
        sentences = [" ".join(draw.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(40)]
        (folder / f"{number:02d}.txt").write_text("\n".join(sentences))
    (folder / "copy.md").write_text((folder / "05.txt").read_text())
    (folder / "noise.txt").write_bytes(b"\xff\xfe\xfd")
    return folder


def config_of(folder: Path, **changed: object) -> prepare.Config:
    return prepare.Config(**{"sources": (str(folder),), "shard_mib": 0.004, "val_fraction": 0.1, **changed})


def inputs_in(run_folder: Path) -> Inputs:
    run_folder.mkdir(exist_ok=True)
    return Inputs({}, Draft(run_folder / "prepare-00000000"), run_folder, Progress("prepare"))


def content(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


@pytest.fixture(scope="module")
def corpus(sources: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepare.run(config_of(sources), inputs_in(tmp_path_factory.mktemp("run")), cluster)


def test_the_artifact(corpus: Artifact) -> None:
    found = open_artifact(corpus.path, "corpus")
    account, files = found.json("card.json")["account"], found.json("index.json")["files"]
    assert account["records"] == 26
    assert (account["kept"], account["dropped"]) == (24, {"exact_duplicate": 1})
    assert account["quarantined"] == {"not_utf8": 1}
    assert corpus.figures["train_documents"] + corpus.figures["val_documents"] == 24
    rows = [row for entry in files for row in pq.read_table(found.file(entry["path"])).to_pylist()]
    assert {row["id"] for row in rows} == {f"{number:02d}.txt" for number in range(24)}
    assert set(rows[0]) == {"id", "source", "kind", "language", "text", "parts"}
    (bad,) = map(json.loads, found.file("quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["offset"], bad["reason"]) == ("noise.txt", 0, "not_utf8")
    (copy,) = map(json.loads, found.file("rejected.jsonl").read_text().splitlines())
    assert copy == {"id": "copy.md", "reason": "exact_duplicate", "duplicate_of": "05.txt"}
    known = {"index.json", "card.json", "card.html", "rejected.jsonl", "quarantine.jsonl"}
    known |= {entry["path"] for entry in files}
    assert set(content(found)) == known, "no file of the work is left"


def test_the_result_line(corpus: Artifact) -> None:
    assert corpus.manifest.summary.startswith("24 of 26 documents kept (")
    assert corpus.manifest.summary.endswith("; dropped 1: exact_duplicate 1; quarantined 1: not_utf8 1")


def test_one_worker_makes_the_same_bytes(corpus: Artifact, sources: Path, cluster: Cluster, tmp_path: Path) -> None:
    alone = prepare.run(config_of(sources), inputs_in(tmp_path / "run"), OneWorker(cluster))  # type: ignore[arg-type]
    assert content(alone) == content(corpus)


KILLED = """
import sys
from pathlib import Path
from raymill.artifact import Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.stages import prepare
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress

run = Path(sys.argv[1])
with Cluster(ClusterConfig()) as cluster:
    config = prepare.Config.model_validate_json(sys.argv[2])
    prepare.run(config, Inputs({}, Draft(run / "prepare-00000000"), run, Progress("prepare")), cluster)
"""


@pytest.mark.chaos  # test_data_faults kills at random points in every run of the checks
def test_kill_9_and_go_on(corpus: Artifact, sources: Path, cluster: Cluster, tmp_path: Path) -> None:
    config = config_of(sources)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), config.model_dump_json()]
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    work = tmp_path / "run" / "prepare-00000000.partial" / ".work"
    deadline = time.monotonic() + 120
    while not list(work.glob("clean-*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "prepare-00000000").exists()
    finished = {path: path.stat().st_ino for path in work.glob("clean-*.json")}
    draft_inputs = inputs_in(tmp_path / "run")
    keep = draft_inputs.draft.checkpoint_clock
    seen: list[bool] = []

    def watch() -> None:
        seen.append(all(path.stat().st_ino == inode for path, inode in finished.items() if path.exists()))
        keep()

    draft_inputs.draft.checkpoint_clock = watch  # type: ignore[method-assign]
    assert content(prepare.run(config, draft_inputs, cluster)) == content(corpus)
    assert seen and all(seen), "what was finished was not made again"


def test_nothing_left_says_why_and_publishes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("Hi.")
    (tmp_path / "in" / "b.txt").write_text("")
    with pytest.raises(DataError, match="no document is left") as caught:
        prepare.run(config_of(tmp_path / "in"), inputs_in(tmp_path / "run"), cluster)
    assert caught.value.why == "of 2 records: dropped 2: empty 1, too_short 1; quarantined 0"
    assert not (tmp_path / "run" / "prepare-00000000").exists()


@pytest.mark.parametrize(
    ("name", "text", "what", "fix"),
    [
        ("rows.jsonl", '{"content": "x"}\n' * 3, "no document is left", "set text_field of its source"),
        ("a.txt", "\xff", "no document is left", "save the files as UTF-8"),
        ("a.txt", "word " * 30, "no document is left", "lower prepare.min_words"),
        (
            "a.py",
            ONE_MODULE,
            "one document is left",
            "give more text",
        ),
    ],
)
def test_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, what: str, fix: str) -> None:
    """The fix fits what took most of the records. Without Ray: the work is done here."""
    import raymill.cluster.data

    monkeypatch.setattr(raymill.cluster.data, "map_items", lambda cluster, work, items: map(work, items))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=what) as caught:
        prepare.run(config_of(tmp_path / "in"), inputs_in(tmp_path / "run"), None)  # type: ignore[arg-type]
    assert fix in caught.value.fix


def test_sources_that_change_meanwhile_are_noticed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raymill.cluster.data

    (tmp_path / "in").mkdir()
    for path in sources.glob("0*.txt"):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())

    def map_and_write(cluster: object, work: Callable[[object], object], items: list[object]) -> object:
        for item in items:
            yield work(item)
        (tmp_path / "in" / "new.txt").write_text("a late file")

    monkeypatch.setattr(raymill.cluster.data, "map_items", map_and_write)
    with pytest.raises(DataError, match="the sources changed while they were read"):
        prepare.run(config_of(tmp_path / "in"), inputs_in(tmp_path / "run"), None)  # type: ignore[arg-type]
    monkeypatch.setattr(raymill.cluster.data, "map_items", lambda cluster, work, items: map(work, items))
    again = prepare.run(config_of(tmp_path / "in"), inputs_in(tmp_path / "run"), None)  # type: ignore[arg-type]
    assert again.figures["records"] == 11


def test_the_source_state_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = prepare.source_state(config_of(tmp_path))
    (tmp_path / "b.txt").write_text("two")
    assert prepare.source_state(config_of(tmp_path)) != before


def test_a_document_must_hold_two_segments() -> None:
    with pytest.raises(ConfigError, match="raise it to at least 2"):
        load(prepare.Config, None, ["segment_kib=1024", "max_document_mib=1"])
