"""Bad words: exact at the borders of words, blind to case, by share or by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from raymill.corpus.bad_words import BadWords, count_bad, load_bad_words
from raymill.corpus.phrases import PhraseTable
from raymill.errors import DataError


@pytest.fixture
def own(tmp_path: Path) -> PhraseTable:
    path = tmp_path / "words.txt"
    path.write_text(
        "\ufeff# notes\n\nDarn\nblasted thing\nMist\u00fcck\nScheibenkleister-Stra\u00dfe\n\u574f\u86cb\n", "utf-8"
    )
    return load_bad_words(str(path))


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("DARN! Oh darn, darn.", 3),
        ("darned darning adarn dar n", 0),
        ("The blasted\nthing, a blasted-thing", 4),
        ("blasted other thing", 0),
        ("mist\u00fcck MIST\u00dcCK", 2),
        ("SCHEIBENKLEISTER STRASSE", 2),
        ("\u4f60\u662f\u4e2a\u574f\u86cb\u3002", 2),
        ("", 0),
    ],
)
def test_matches(own: PhraseTable, text: str, bad: int) -> None:
    assert count_bad(text, own).bad == bad


def test_words_are_counted(own: PhraseTable) -> None:
    assert count_bad("one darn word, don't you think", own).words == 7


def test_shares(own: PhraseTable) -> None:
    found = count_bad("darn " + "word " * 99, own)
    assert found.is_over(0.0)
    assert found.is_over(0.009)
    assert not found.is_over(0.01)
    assert not count_bad("word", own).is_over(0.0)
    assert not count_bad("", own).is_over(0.0)


def test_the_builtin_list() -> None:
    table = load_bad_words(BadWords().words)
    assert count_bad("What a load of Bullshit, you motherfuckers", table).bad == 2
    innocent = "The Scunthorpe class assessed Dick and the cockpit of Essex; a title, shiitake, Matsushita, thoracic"
    assert count_bad(innocent, table).bad == 0


@pytest.mark.parametrize("content", [None, b"", b"# only notes\n", b"\xff\xfe\xff"])
def test_a_list_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"words\.txt: the list of bad words") as raised:
        load_bad_words(str(path))
    assert "builtin:en" in str(raised.value)


def test_settings() -> None:
    with pytest.raises(ValidationError, match="max_share"):
        BadWords(max_share=1.0)
