"""Artifacts are whole or absent: drafts survive a kill, and every damage is found on opening."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raymill.artifact import MANIFEST, Artifact, Draft, open_artifact, write_atomic
from raymill.config import Config
from raymill.errors import ArtifactError


class Settings(Config):
    """Settings of a stage."""

    size: int = 3
    """Anything."""


def publish(draft: Draft) -> Artifact:
    figures = {"documents": 2}
    return draft.publish("corpus", "prepare", config=Settings(), inputs={}, summary="2 documents", figures=figures)


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    draft = Draft(tmp_path / "run" / "prepare-0123abcd")
    (draft.path / "part").mkdir()
    (draft.path / "part" / "a.bin").write_bytes(bytes(range(256)))
    (draft.path / "b.json").write_text('{"x": 1}')
    return publish(draft)


def test_publish_is_one_rename(made: Artifact) -> None:
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["prepare-0123abcd"]
    again = open_artifact(made.path, "corpus")
    assert again.manifest == made.manifest
    assert [entry.path for entry in again.manifest.files] == ["b.json", "part/a.bin"]
    assert (again.manifest.config, again.figures, again.name) == ({"size": 3}, {"documents": 2}, "prepare-0123abcd")
    assert again.json("b.json") == {"x": 1}


def test_nothing_is_published_before_publish(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "prepare-0123abcd")
    (draft.path / "a").write_text("a")
    assert not draft.final.exists()
    with pytest.raises(ArtifactError, match="is not an artifact"):
        open_artifact(draft.path)


def test_a_file_it_does_not_hold(made: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"holds no c\.json"):
        made.file("c.json")


def test_a_flipped_bit_is_found(made: Artifact) -> None:
    content = bytearray((made.path / "part" / "a.bin").read_bytes())
    content[100] ^= 1
    (made.path / "part" / "a.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.bin is damaged\n  why: its sha256"):
        open_artifact(made.path)
    assert open_artifact(made.path, verify=False).name == made.name


def test_a_cut_file_is_found_even_without_hashing(made: Artifact) -> None:
    (made.path / "part" / "a.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="it has 5 bytes; its manifest says 256"):
        open_artifact(made.path, verify=False)


def test_a_missing_file_is_found(made: Artifact) -> None:
    (made.path / "b.json").unlink()
    with pytest.raises(ArtifactError, match=r"b\.json is missing"):
        open_artifact(made.path, verify=False)


def test_a_folder_in_place_of_a_file_is_found(made: Artifact) -> None:
    (made.path / "b.json").unlink()
    (made.path / "b.json").mkdir()
    with pytest.raises(ArtifactError, match=r"b\.json is missing"):
        open_artifact(made.path)


def test_wrong_kind(made: Artifact) -> None:
    with pytest.raises(ArtifactError, match="holds corpus, not tokens"):
        open_artifact(made.path, "tokens")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"corpus"', '"soup"'),
        lambda text: text.replace('"stage"', '"stagee"'),
        lambda text: "\x00" * len(text),
    ],
)
def test_a_damaged_manifest_is_found(made: Artifact, damage: object) -> None:
    assert callable(damage)
    text = (made.path / MANIFEST).read_text()
    (made.path / MANIFEST).write_text(damage(text))
    assert (made.path / MANIFEST).read_text() != text
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged(.|\n)*hint: delete"):
        open_artifact(made.path)


def test_no_artifact_there(tmp_path: Path, made: Artifact) -> None:
    with pytest.raises(ArtifactError, match="is not an artifact"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="cannot be opened"):
        open_artifact(made.path / "b.json")


def test_every_message_has_a_fix(made: Artifact) -> None:
    (made.path / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="run the job again"):
        open_artifact(made.path)


KILLED = """
import os, signal, sys
from pathlib import Path
from raymill.artifact import Draft, Manifest, list_files, write_atomic
draft = Draft(Path(sys.argv[1]))
draft._started -= 100
write_atomic(draft.path / "half.txt", "work")
(draft.path / ".next.txt.1.tmp").write_text("torn")
draft.checkpoint_clock()
if sys.argv[2] == "published":
    # dies between the manifest and the rename
    Path.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    draft.publish("corpus", "prepare", config=Manifest.model_construct(), inputs={}, summary="", figures={})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["working", "published"])
def test_a_killed_draft_is_taken_up_again(tmp_path: Path, when: str) -> None:
    final = tmp_path / "run" / "prepare-0123abcd"
    done = subprocess.run([sys.executable, "-c", KILLED, str(final), when], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()

    draft = Draft(final)
    assert (draft.path / "half.txt").read_text() == "work"
    (draft.path / "rest.txt").write_text("more")
    made = publish(draft)
    assert [entry.path for entry in made.manifest.files] == ["half.txt", "rest.txt"]
    assert {path.name for path in made.path.iterdir()} == {"half.txt", "rest.txt", MANIFEST}
    assert open_artifact(final) == made
    if when == "working":
        assert made.manifest.duration_s >= 100
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_a_live_artifact_is_replaced(made: Artifact) -> None:
    draft = Draft(made.path)
    (draft.path / "new.txt").write_text("new")
    publish(draft)
    assert [entry.path for entry in open_artifact(made.path).manifest.files] == ["new.txt"]


def test_drafts_are_private(tmp_path: Path) -> None:
    assert Draft(tmp_path / "x").path.stat().st_mode & 0o077 == 0


def test_write_atomic_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", json.dumps([1]))
    write_atomic(tmp_path / "a.json", b"[2]")
    assert (tmp_path / "a.json").read_bytes() == b"[2]"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
