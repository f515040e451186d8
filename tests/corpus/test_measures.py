"""What is measured, against counts made by hand or by plain Python."""

from __future__ import annotations

import pytest

from raymill.corpus.measures import Measures, measure


def of(text: str) -> Measures:
    return measure(text.encode())


def test_lines() -> None:
    found = of("- one\n  * two\n\u2022 three\nplain...\nends\u2026\n\nplain...\n")
    assert (found.lines, found.bullet_lines, found.ellipsis_lines) == (6, 3, 3)
    assert (found.repeated_lines, found.repeated_line_chars) == (1, len("plain..."))
    assert (found.longest_line_chars, found.line_chars) == (8, 5 + 5 + 7 + 8 + 5 + 8)


def test_paragraphs() -> None:
    found = of("a b\nc\n\n\nother\n \na b\nc\n\na b\n")
    assert (found.paragraphs, found.repeated_paragraphs, found.repeated_paragraph_chars) == (4, 1, 4)


def test_words_and_letters() -> None:
    found = of("The caf\u00e9, 42 -- \u043c\u0438\u0440\u3000ok\u00a0end! #tag a... b\u2026 ....")
    assert found.words == 11
    assert found.words_with_letter == 8
    assert found.letters == 3 + 4 + 3 + 2 + 3 + 3 + 1 + 1  # The cafe mir ok end tag a b
    assert (found.hashes, found.ellipses) == (1, 3)


def test_chars_are_characters_not_bytes() -> None:
    assert of("\u00e9\u00e8\n\U0001f600").chars == 4


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The and OF to", 4),
        ('(with) "have" be, that\'s', 3),
        ("then android toe", 0),
    ],
)
def test_stop_words(text: str, count: int) -> None:
    assert of(text).stop_words == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("One. Two! Three?", 3), ('He said "no." (Really?)', 2), ("version 3.11 and e.g this", 0), ("end", 0)],
)
def test_sentences(text: str, count: int) -> None:
    assert of(text).sentences == count


def test_top_grams_take_the_commonest_and_of_equals_the_longest() -> None:
    found = of("a bb a bb long word long word x")
    assert found.top_gram_shares[0] == pytest.approx(2 * len("long word") / found.chars)
    assert found.top_gram_shares[2] == 0


def test_repeated_grams_count_no_character_twice() -> None:
    words = ["one", "two", "three", "four", "five", "six"]
    found = of(" ".join(words * 3))
    once = sum(map(len, words))
    assert found.repeated_gram_shares[0] == pytest.approx((once * 2 - len("five") - len("six")) / found.chars, abs=0.1)
    assert found.repeated_gram_shares[1] == pytest.approx(2 * once / found.chars)
    assert of(" ".join(words)).repeated_gram_shares == (0,) * 6


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "\u00e9", "\U0001f600", "..", "#"])
def test_the_smallest_texts(text: str) -> None:
    assert of(text).words <= 1
