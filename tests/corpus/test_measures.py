"""What is measured in lines and characters, against counts made by hand or by plain Python."""

from __future__ import annotations

import re

import numpy as np
import pytest

from raymill.corpus.measures import CodeMeasures, count_repeats, measure_code, new_seen, space_width, trim


def repeats(text: str, breaks: int) -> tuple[int, int, int]:
    data = np.frombuffer(text.encode(), np.uint8)
    return count_repeats(data, 0, len(data), breaks, new_seen(text.count("\n") + 2))


def plain_repeats(text: str, breaks: int) -> tuple[int, int, int]:
    pieces = re.split(f"\n{{{breaks},}}", text)
    again = [piece for place, piece in enumerate(pieces) if piece in pieces[:place]]
    return len(pieces), len(again), sum(map(len, again))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "\n",
        "\n\n",
        "a\na",
        "a\n\na\nb\n\na\nb",
        "\na\n\n\nb\na\n",
        "a\n\na\n\n",
        "\u00e9\u00e8\n" * 3,
        "a\nb\n\na\nb\n\nc",
    ],
)
def test_repeats(text: str) -> None:
    assert repeats(text, 1) == plain_repeats(text, 1)
    assert repeats(text, 2) == plain_repeats(text, 2)


def test_a_table_is_used_again() -> None:
    data = np.frombuffer(b"a\nb\na", np.uint8)
    seen = new_seen(4)
    assert [count_repeats(data, 0, 5, 1, seen) for _ in range(20)] == [(3, 1, 1)] * 20


def test_white_space_is_what_python_says() -> None:
    for point in [*range(0xD800), *range(0xE000, 0x11000)]:
        char = chr(point)
        data = np.frombuffer(char.encode(), np.uint8)
        assert (space_width(data, 0) > 0) == char.isspace(), hex(point)


@pytest.mark.parametrize("text", ["", " ", "a", " \u3000a b\u00a0\n", "\u00e9\u2028", "\u2028\u00e9", "\x85"])
def test_trim(text: str) -> None:
    data = text.encode()
    start, end = trim(np.frombuffer(data, np.uint8), 0, len(data))
    assert data[start:end].decode() == text.strip()


def code(text: str) -> CodeMeasures:
    return measure_code(text.encode())


def test_lines_of_code() -> None:
    found = code("x = 1\n\n  \u00e9 = 22\nx = 1\n")
    assert (found.chars, found.lines, found.longest_line_chars, found.line_chars) == (22, 3, 8, 5 + 6 + 5)
    assert found.repeated_line_chars == 5
    assert found.letters == 3


def test_repeated_phrases_of_code_count_no_character_twice() -> None:
    words = [f"w{number}" for number in range(10)]
    assert code(" ".join(words)).repeated_phrase_chars == 0
    assert code(" ".join(words * 3)).repeated_phrase_chars == 40
    assert code(" ".join(words * 2) + " w0").repeated_phrase_chars == 20


@pytest.mark.parametrize("text", ["", " ", "\n", "\u00e9", "\U0001f600"])
def test_the_smallest_texts(text: str) -> None:
    assert code(text).chars == len(text)
