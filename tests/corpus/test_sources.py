"""Which files a corpus is read from."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from raymill.corpus.sources import Source, SourceFile, fingerprint, group, name_sources
from raymill.corpus.sources import list_files as list_sources
from raymill.errors import DataError, UsageError


def list_files(paths: list[str]) -> list[SourceFile]:
    return list_sources([Source(path=path) for path in paths])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "deep/c.jsonl.gz", "deep/d.py.zst", "photo.jpg", ".hidden.txt", "deep/e.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(sources: list[str]) -> list[str]:
    return [file.name for file in list_files(sources)]


def test_a_folder_gives_its_readable_files_in_order(folder: Path) -> None:
    assert names([str(folder)]) == ["a.md", "b.txt", "deep/c.jsonl.gz", "deep/d.py.zst", "deep/e.TXT"]


def test_format_packing_and_kind_come_from_the_ending(folder: Path) -> None:
    found = {file.name: (file.format, file.packing, file.kind) for file in list_files([str(folder)])}
    assert found["deep/c.jsonl.gz"] == ("jsonl", "gz", "prose")
    assert found["deep/d.py.zst"] == ("code", "zst", "code")
    assert found["deep/e.TXT"] == ("txt", "plain", "prose")


def test_a_glob_names_files_below_its_fixed_part(folder: Path) -> None:
    assert names([str(folder / "*.txt")]) == ["b.txt"]
    assert names([str(folder / "**" / "*.gz")]) == ["deep/c.jsonl.gz"]
    assert names([str(folder / "d*")]) == ["deep/c.jsonl.gz", "deep/d.py.zst", "deep/e.TXT"]


def test_several_sources_are_named_and_a_file_counts_once(folder: Path) -> None:
    assert names([str(folder / "b.txt"), str(folder / "*.txt"), str(folder / "a.md")]) == ["b/b.txt", "a/a.md"]


def test_a_missing_path_names_its_neighbour(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file or folder .*bb\.txt") as caught:
        list_files([str(folder / "bb.txt")])
    assert f"did you mean {folder / 'b.txt'}?" in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("source", ["photo.jpg", "*.pdf", "empty"])
def test_nothing_to_read_names_the_endings(folder: Path, source: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text that can be read") as caught:
        list_files([str(folder / source)])
    assert "py, txt, md, jsonl" in caught.value.fix


def test_builtin_python_is_the_standard_library_without_tests() -> None:
    files = {file.name: file for file in list_files(["builtin:python"])}
    assert files["json/decoder.py"].kind == "code"
    assert files["pydoc_data/topics.py"].format == "topics"
    assert files["pydoc_data/topics.py"].kind == "prose"
    assert sum(file.size_bytes for file in files.values()) > 5e6
    assert not [name for name in files if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_shards_hold_neighbours_and_what_cannot_be_cut_stands_alone(tmp_path: Path) -> None:
    for name, size in (("a", 40), ("b", 50), ("c", 300), ("d", 10), ("e", 95)):
        (tmp_path / f"{name}.py").write_text("x" * size)
    shards = group(list_files([str(tmp_path)]), 100)
    assert [[file.name[0] for file in shard.files] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.index for shard in shards] == [0, 1, 2, 3]
    assert shards[0].size_bytes == 90


def test_a_large_file_of_lines_is_cut_without_a_gap(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x" * 1001)
    shards = group(list_files([str(tmp_path)]), 100)
    ranges = [(file.start, file.stop) for shard in shards for file in shard.files]
    assert len(ranges) == 11
    assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))
    assert (ranges[0][0], ranges[-1][1]) == (0, 1001)
    assert all(shard.size_bytes <= 100 for shard in shards)


def test_the_fingerprint_changes_with_a_file(folder: Path) -> None:
    before = fingerprint(list_files([str(folder)]))
    assert before == fingerprint(list_files([str(folder)]))
    os.utime(folder / "b.txt", ns=(1, 1))
    touched = fingerprint(list_files([str(folder)]))
    (folder / "z.txt").write_text("new")
    assert len({before, touched, fingerprint(list_files([str(folder)]))}) == 3


def test_a_name_that_is_not_utf8_is_told(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_text("no text, so nobody minds its name")
    assert len(names([str(folder)])) == 5
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(DataError, match=r"the name .*caf\\xe9\.txt is not UTF-8"):
        list_files([str(folder)])


def test_a_folder_that_cannot_be_listed_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep cannot be read(.|\n)*Permission denied(.|\n)*chmod"):
        list_files([str(folder)])
    with pytest.raises(DataError, match="File name too long"):
        list_files(["x" * 300])


def test_a_plain_string_is_short_for_a_path() -> None:
    source = Source.model_validate("builtin:python")
    assert source == Source(path="builtin:python")


def test_names_are_short_and_no_two_are_equal() -> None:
    paths = [
        "builtin:python",
        "s3://box/wiki/*.jsonl?scheme=http",
        "data/wiki",
        "data/books.jsonl.gz",
        "hf://datasets/a/b",
    ]
    sources = [Source(path=path) for path in paths] + [Source(path="x", name="wiki-2"), Source(path="wiki/")]
    assert name_sources(sources) == ("python", "wiki", "wiki-3", "books", "b", "wiki-2", "wiki-4")
    with pytest.raises(UsageError, match="two sources are named same"):
        name_sources([Source(path="a", name="same"), Source(path="b", name="same")])


def test_settings_override_what_the_ending_says(tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("{}")
    (file,) = list_sources([Source(path=str(tmp_path), format="jsonl", kind="code", name="n")])
    assert (file.format, file.kind, file.source, file.name) == ("jsonl", "code", "n", "rows.dat")


@pytest.mark.parametrize("name", ["id", "source", "kind", "language", "text", "parts", "start_char", "end_char"])
def test_a_kept_column_may_not_be_one_of_the_corpus(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} is a column of every corpus; fix: leave it out"):
        Source(path="x", keep=("url", name))


def test_a_column_is_kept_once() -> None:
    with pytest.raises(ValidationError, match="url is named twice; fix: name each column once"):
        Source(path="x", keep=("url", "date", "url"))
