"""Near duplicates judged against the exact Jaccard similarity over all pairs."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from raymill.corpus.dedup import BANDS, ROWS, sign

WORDS = [f"{a}{b}{c}" for a in "bdfglmn" for b in "aeiou" for c in ("r", "st", "mp", "l", "nd")]
GOLDEN = ["0xe458b77e255cdbfe", "0xa522bb3270e18c2f", "0xe35b2e5a560865b5", "0xabbc67346fb82b64"]


def family(draw: random.Random, copies: int, changed: float) -> list[str]:
    """A text and copies of it in which each word was exchanged with this probability."""
    words = [draw.choice(WORDS) + draw.choice(WORDS) for _ in range(300)]
    texts = [" ".join(words)]
    for _ in range(copies):
        texts.append(" ".join(draw.choice(WORDS) if draw.random() < changed else word for word in words))
    return texts


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


def test_hits_follow_the_theory_at_every_similarity() -> None:
    draw = random.Random(3)
    rates = [0.004, 0.008, 0.015, 0.025, 0.04, 0.06, 0.1]
    texts = [text for rate in rates for _ in range(30) for text in family(draw, 3, rate)]
    sets = [shingles(text) for text in texts]
    keys = np.array([sign(text.encode(), bands=True) for text in texts])[:, 2:]
    hits: dict[int, list[bool]] = {}
    expected: dict[int, list[float]] = {}
    for first in range(len(texts)):
        for second in range(first + 1, min(first + 4, len(texts))):
            jaccard = len(sets[first] & sets[second]) / len(sets[first] | sets[second])
            hit = bool((keys[first] == keys[second]).any())
            hits.setdefault(int(jaccard * 10), []).append(hit)
            expected.setdefault(int(jaccard * 10), []).append(1 - (1 - jaccard**ROWS) ** BANDS)
    assert {3, 4, 5, 6, 7, 8, 9} <= set(hits)
    for tenth, found in hits.items():
        theory = float(np.mean(expected[tenth]))
        tolerance = 0.02 + 4 * (theory * (1 - theory) / len(found)) ** 0.5
        assert abs(np.mean(found) - theory) < tolerance, (tenth, np.mean(found), theory, len(found))


@pytest.mark.parametrize(
    "other",
    [
        "The GREEN river, of 2,345 boats -- met us!",
        "the green\nriver of 1.2 boats met us",
        "The green river of 9 9 boats met us",
    ],
    ids=["case and marks", "spaces", "digits"],
)
def test_spelling_that_makes_no_difference(other: str) -> None:
    base = sign(b"the green river of 7 7 boats met us", bands=True)
    assert (base[2:] == sign(other.encode(), bands=True)[2:]).all()
    assert (base[:2] != sign(other.encode(), bands=True)[:2]).any()


@pytest.mark.parametrize("text", ["", "one two three four", "... !!! --- ??? +++ ((( )))"])
def test_short_texts_have_no_near_duplicates(text: str) -> None:
    assert not sign(text.encode(), bands=True)[2:].any()


def test_without_bands_only_the_text_is_hashed() -> None:
    text = b"the green river of seven boats met us"
    assert not sign(text, bands=False)[2:].any()
    assert (sign(text, bands=False)[:2] == sign(text, bands=True)[:2]).all()


def test_signatures_never_change() -> None:
    """They are compared between runs and machines; a new formula needs a new name in the constants' seed."""
    signature = sign(b"the green river of seven boats met us on a cold morning", bands=True)
    assert [hex(int(value)) for value in signature[:4]] == GOLDEN
