"""The figures of a comparison, against figures worked out by hand."""

from __future__ import annotations

import pytest

from raymill.tokenizer.compare import SourceRow, compare
from raymill.tokenizer.tokenizer import Tokenizer


def test_a_row_per_tokenizer_with_figures_by_source() -> None:
    learned = Tokenizer.train(["cat dog"] * 3, 300, "word")
    letters = Tokenizer.train([], 300, "char")
    rows = compare({"words": learned, "bytes": letters}, {"pets": ["cat dog", "cat"], "other": ["\u00fc"], "none": []})
    assert [row.name for row in rows] == ["words", "bytes"]
    words, in_bytes = rows
    assert words.vocab_size == 261 and in_bytes.vocab_size == 259
    assert words.sources == {"pets": SourceRow(10 / 3, 3 / 3), "other": SourceRow(1, 2), "none": SourceRow(0, 0)}
    assert in_bytes.sources["pets"] == SourceRow(1, 10 / 3)
    assert words.bytes_per_token == pytest.approx(12 / 5)
    assert words.used_share == pytest.approx(4 / 261), "cat, dog and two bytes"
    assert in_bytes.used_share == pytest.approx(9 / 259), "c a t d o g, space and two bytes"
    assert words.mb_per_s > 0


def test_nothing_to_compare_on() -> None:
    (row,) = compare({"bytes": Tokenizer.train([], 300, "char")}, {})
    assert (row.bytes_per_token, row.mb_per_s, row.used_share, dict(row.sources)) == (0, 0, 0, {})
