"""A part as a program: rows by name, one after the other; the table, what stands beneath it, the file and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import command, peers
from benchmarks.data import __main__ as data
from benchmarks.table import Row
from benchmarks.training import __main__ as training

NAMES = ("one", "two", "three")
PAGE = "`part`: beside its peers.\n\nMore."


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A part whose rows are worth 1, 2 and nothing, without peers."""
    monkeypatch.setattr(peers, "ensure", lambda cache, pins, first: peers.Peers(Path("python"), {"peer": "1.0"}, {}))
    figures = dict(zip(NAMES, (1.0, 2.0, None), strict=True))

    def prepare(ready: peers.Peers) -> command.Work:
        def work(name: str, folder: Path) -> tuple[list[Row], str]:
            assert ready.versions == {"peer": "1.0"} and folder.is_dir() and not list(folder.iterdir())
            assert folder.is_relative_to(tmp_path / "cache")
            return [Row(name, "MB/s", figures[name])], f"beneath {name}" if name == "two" else ""

        return work

    def run(*arguments: str) -> int:
        given = [*arguments, "--cache", str(tmp_path / "cache")]
        options = command.parser("benchmarks.part", PAGE, NAMES, "less").parse_args(given)
        return command.run(options, prepare, ("numpy",), {})

    return run


def test_the_rows_that_are_named_are_told(
    program: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert program("--rows", "two,one") == 0
    said = capsys.readouterr()
    assert said.err == "two ...\none ...\n"
    assert [line.split()[0] for line in said.out.splitlines() if "MB/s" in line] == ["two", "one"]
    assert said.out.index("MB/s") < said.out.index("beneath two") < said.out.index("took 0 s")
    assert "peers: {'peer': '1.0'}" in said.out
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_file_has_each_row_and_its_machine(program: Callable[..., int], tmp_path: Path) -> None:
    program("--rows", "one,two", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["work"], row["ours"]) for row in rows] == [("one", 1.0), ("two", 2.0)]
    assert rows[0]["machine"]["peers"] == {"peer": "1.0"}


def test_a_row_without_a_figure_of_ours_is_no_success(program: Callable[..., int]) -> None:
    assert program() == 1


@pytest.mark.parametrize(("main", "works"), [(data.main, data.WORKS), (training.main, training.WORKS)])
def test_a_name_that_is_no_row_is_refused(
    main: Callable[[list[str]], int],
    works: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(peers, "ensure")  # a name that is taken must not start the benchmark from a test
    with pytest.raises(SystemExit):
        main(["--rows", f"{next(iter(works))},steps"])
    assert f"steps is no row; fix: name some of {', '.join(works)}" in capsys.readouterr().err


def test_help_says_what_the_part_is_and_its_rows(
    program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("usage: python -m benchmarks.part ") and "`part`: beside its peers. options" in told
    assert "less: under 10 minutes" in told and "of one, two, three; all of them" in told
