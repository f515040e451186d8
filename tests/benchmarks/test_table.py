"""Rows: the ratio is above 1 where ours is better, a peer without a figure is said, and JSON carries the machine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.data.rates import Rate, rate_row
from benchmarks.table import Row, render, save


def rate(value: float, failure: str | None = None) -> Rate:
    return Rate(value, 0.1, value, 5.0, 3, failure)


def test_the_ratio_is_over_the_best_peer() -> None:
    assert Row("w", "MB/s", 30.0, {"a": 10.0, "b": 15.0, "c": None}).ratio == 2.0
    assert Row("w", "GB", 1.0, {"a": 4.0, "b": 3.0}, lower_is_better=True).ratio == 3.0


def test_no_ratio_without_two_figures() -> None:
    assert Row("w", "MB/s", 30.0).ratio is None
    assert Row("w", "MB/s", 30.0, {"a": None}).ratio is None
    assert Row("w", "MB/s", None, {"a": 1.0}).ratio is None
    assert Row("w", "%", 0.0, {"a": 17.0}, lower_is_better=True).ratio is None


def test_a_missing_and_a_failing_peer_are_said() -> None:
    row = rate_row(
        "w", {"raymill": rate(9.0), "a": rate(3.0), "b": rate(0.0, "it broke")}, {"c": "not for this Python"}
    )
    assert (row.ours, row.peers, row.ratio) == (9.0, {"a": 3.0, "b": None, "c": None}, 3.0)
    assert "no figure of b: it broke" in row.note
    assert "no figure of c: not for this Python" in row.note


def test_our_failure_is_a_row_without_a_figure() -> None:
    row = rate_row("w", {"raymill": rate(0.0, "ImportError"), "a": rate(3.0)}, {})
    assert row.ours is None
    assert "no figure of raymill: ImportError" in row.note


def test_the_table_shows_figures_and_notes() -> None:
    text = render([Row("signing", "MB/s", 30.0, {"a": 15.0, "b": None}, 0.04, rounds=3, note="5 MB")])
    heading, rule, line = text.splitlines()[:3]
    assert heading.split() == ["work", "unit", "ours", "best", "peer", "ratio", "spread", "peers"]
    assert set(rule) == {"-"}
    assert line.split() == ["signing", "MB/s", "30", "15", "2x", "4%", "a", "15,", "b", "none"]
    assert "signing: 5 MB" in text


def test_json_is_a_list_of_rows_with_the_machine(tmp_path: Path) -> None:
    save([Row("w", "MB/s", 30.0, {"a": 10.0}, 0.02)], {"cpu": "x", "load": 0.5}, tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    expected = {"work": "w", "ours": 30.0, "peers": {"a": 10.0}, "ratio": 3.0, "unit": "MB/s", "spread": 0.02}
    assert expected.items() <= row.items()
    assert row["machine"] == {"cpu": "x", "load": 0.5}
