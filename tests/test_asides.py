"""Files written aside: complete under their name or not there at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymill.artifact import discard, open_aside, sweep_asides


def test_a_file_gets_its_name_at_the_end(tmp_path: Path) -> None:
    goal, work = tmp_path / "goal" / "a.bin", tmp_path / "work"
    goal.parent.mkdir()
    work.mkdir()
    with open_aside(goal, work) as file:
        file.write(b"half")
        assert not goal.exists()
        assert len(list(work.iterdir())) == 1
    assert goal.read_bytes() == b"half"
    assert list(work.iterdir()) == []


def test_a_failed_block_leaves_the_old_content(tmp_path: Path) -> None:
    goal = tmp_path / "a.bin"
    goal.write_bytes(b"old")
    with pytest.raises(KeyError), open_aside(goal) as file:
        file.write(b"new")
        raise KeyError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".work.7.tmp").mkdir(parents=True)
    (tmp_path / "deep" / ".work.7.tmp" / ".inner.7.tmp").write_text("x")
    (tmp_path / ".a.bin.7.tmp").write_text("x")
    (tmp_path / "a.bin").write_text("x")
    sweep_asides(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "deep"]


def test_discard(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a").write_text("x")
    discard(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
