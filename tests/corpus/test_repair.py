"""Repair against ftfy itself: what it would mend is mended, what is sound is not touched."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

import ftfy
import pytest

from raymill.corpus.repair import repair

SENTENCES: dict[str, list[str]] = json.loads((Path(__file__).parent / "sentences.json").read_text())
CHARSETS = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "iso-8859-2", "mac-roman", "cp437")


def by_ftfy(text: str) -> str:
    return ftfy.fix_text(
        text,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
    )


def damaged() -> list[str]:
    """Every sentence misread in every charset, once, twice, in part, and with the losses that come with it."""
    draw = random.Random(5)
    variants = []
    for sentences, charset in product(SENTENCES.values(), CHARSETS):
        for sentence in sentences:
            wrong = sentence.encode().decode(charset, "replace")
            words = sentence.split()
            word = draw.randrange(len(words))
            words[word] = words[word].encode().decode(charset, "replace")
            variants += [wrong, wrong.encode(errors="replace").decode(charset, "replace"), " ".join(words)]
            variants += [wrong.replace("\u00a0", " "), sentence + "\n" + wrong + "\n" + sentence]
    return variants


def test_it_mends_what_ftfy_mends() -> None:
    wanted = [(text, by_ftfy(text)) for text in damaged()]
    wanted = [(text, mended) for text, mended in wanted if mended != text]
    assert len(wanted) > 1000
    missed = [text for text, mended in wanted if repair(text) != mended]
    print(f"recall {1 - len(missed) / len(wanted):.4f} on {len(wanted)} damaged texts")
    assert len(missed) <= 0.01 * len(wanted), missed[:5]


@pytest.mark.parametrize("language", SENTENCES)
def test_sound_text_is_not_touched(language: str) -> None:
    sound = SENTENCES[language]
    for text in (*sound, "\n".join(sound * 3), " ".join(sound).upper(), " ".join(sound).title()):
        assert repair(text) == text


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("AT&amp;T and R&D; fish & chips", "AT&T and R&D; fish & chips"),
        ("caf&eacute;\n<b>&amp;</b>\n&amp;", "caf\u00e9\n<b>&amp;</b>\n&amp;"),
        ("a\x00b\x07c\x1b[31mred\x7f\ttab\x0cform", "abcred\ttab\x0cform"),
        ("it\u0092s \u0093fine\u0094", "it\u2019s \u201cfine\u201d"),
        ("\ud83d\ude00 and \ud800 alone", "\U0001f600 and \ufffd alone"),
        ("mark\ufeff in the middle", "mark in the middle"),
        ("\u201cquotes\u201d \ufb01ne \uff21\r\n", "\u201cquotes\u201d \ufb01ne \uff21\r\n"),
        ("", ""),
    ],
    ids=["entity", "entities end at markup", "controls", "c1", "surrogates", "inner mark", "style stays", "empty"],
)
def test_single_faults(text: str, mended: str) -> None:
    assert repair(text) == mended


def test_twice_is_once() -> None:
    draw = random.Random(11)
    alphabet = "ab \n&;<#x3\u00c3\u00a9\u00e2\u20ac\u2122\u0080\ufffd\u0420\u0459\u00b0\u221a\ud800\x07\u4e2d"
    for _ in range(2000):
        once = repair("".join(draw.choice(alphabet) for _ in range(30)))
        assert repair(once) == once


def test_lines_around_a_damaged_one_stay() -> None:
    lines = ["sound \u00e9", "r\u00c3\u00a9sum\u00c3\u00a9", "sound \u00e8", "", "na\u00c3\u00afve"]
    assert repair("\n".join(lines)) == "sound \u00e9\nr\u00e9sum\u00e9\nsound \u00e8\n\nna\u00efve"
