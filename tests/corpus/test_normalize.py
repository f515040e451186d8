"""One text, one spelling."""

from __future__ import annotations

import pytest

from raymill.corpus.normalize import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffa\r\nb\rc\n", "a\nb\nc"),
        ("cafe\u0301", "caf\u00e9"),
        ("\n \n\t\n    indented\n  end  \n\n", "    indented\n  end"),
        ("  one line", "  one line"),
        (" \n\t ", ""),
        ("", ""),
        ("family: \U0001f468\u200d\U0001f469\u200d\U0001f467", "family: \U0001f468\u200d\U0001f469\u200d\U0001f467"),
    ],
    ids=["line ends and mark", "composed", "blank borders", "indent", "blank", "empty", "joined emoji"],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected
