"""Phrases by hashes against the same search over plain strings."""

from __future__ import annotations

import random
import re

import pytest

from raymill.corpus.phrases import build_table, count_hits, hash_words

ALPHABET = [
    "ab",
    "c",
    "Ab",
    "d\u00e9",
    "x1",
    "\u00df",
    "\u4e2d",
    "  ",
    "\n",
    ",",
    "-",
    "'",
    "\u201c",
    "\u00a0",
    "\U0001f600",
    "\u3042",
]


def words_of(text: str, join_at_marks: bool) -> list[str]:
    text = re.sub("([\u4e2d\u3042])", r"\0\1\0", text.casefold())  # scripts without spaces; \0 always parts
    parts = re.split(r"[\s\0]+" if join_at_marks else r"[\s\0,'\u201c\U0001f600-]+", text)
    return [word for part in parts if (word := re.sub(r"[,'\u201c\U0001f600-]", "", part))]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randrange(80)))


@pytest.mark.parametrize("join_at_marks", [True, False])
def test_words(join_at_marks: bool) -> None:
    draw = random.Random(1)
    numbers: dict[str, int] = {}
    for _ in range(500):
        text = random_text(draw)
        words = words_of(text, join_at_marks)
        hashes = hash_words(text, join_at_marks).tolist()
        assert len(hashes) == len(words), repr(text)
        for word, value in zip(words, hashes, strict=True):
            assert numbers.setdefault(word, value) == value
    assert len(set(numbers.values())) == len(numbers) > 50


@pytest.mark.parametrize("opening", [1, 2, 3])
def test_hits(opening: int) -> None:
    draw = random.Random(opening)
    for _ in range(300):
        phrases = [words for _ in range(6) if len(words := words_of(random_text(draw), False)[:5]) >= opening]
        table = build_table(opening, [(len(words), hash_words(" ".join(words), False)) for words in phrases])
        text = " ".join([random_text(draw), *map(" ".join, draw.sample(phrases, len(phrases) // 2)), random_text(draw)])
        words = words_of(text, False)
        for length, hits in zip(
            table.lengths.tolist(), count_hits(hash_words(text, False), table).tolist(), strict=True
        ):
            runs = [words[at : at + length] for at in range(len(words) - length + 1)]
            assert hits == sum(run in phrases for run in runs)
        assert table.lengths.tolist() == sorted({len(words) for words in phrases})


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "\u00e9", "\ud800", "\U0001f600", ".", "\x00"])
def test_the_smallest_texts(text: str) -> None:
    table = build_table(1, [(1, hash_words("word", False))])
    assert count_hits(hash_words(text, False), table).sum() == 0
