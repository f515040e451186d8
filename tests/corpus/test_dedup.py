"""Near duplicates judged against the exact Jaccard similarity over all pairs; clusters against plain Python."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from raymill.corpus.dedup import BANDS, ROWS, SIGNATURE_WIDTH, find_duplicates, sign

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
    signature = sign(text.encode(), bands=True)
    assert not signature[2:].any()
    near = find_duplicates(np.array([signature, sign(b"x y", bands=True)])).near
    assert near.tolist() == [0, 1]


def test_without_bands_only_the_text_is_hashed() -> None:
    text = b"the green river of seven boats met us"
    assert not sign(text, bands=False)[2:].any()
    assert (sign(text, bands=False)[:2] == sign(text, bands=True)[:2]).all()


def signatures_of(rows: list[tuple[int, list[int]]]) -> np.ndarray:
    """Hand-made signatures: a text hash and the first few band keys."""
    made = np.zeros((len(rows), SIGNATURE_WIDTH), np.uint64)
    for row, (text, keys) in zip(made, rows, strict=True):
        row[0] = text
        row[2 : 2 + len(keys)] = keys
    return made


def test_the_first_of_a_group_stays() -> None:
    rows = [(5, [1]), (6, [2]), (5, [1]), (5, [1]), (6, [2])]
    found = find_duplicates(signatures_of(rows))
    assert found.exact.tolist() == [0, 1, 0, 0, 1]
    assert found.near.tolist() == [0, 1, 2, 3, 4]


def test_a_cluster_is_joined_over_bands_and_keeps_its_smallest() -> None:
    rows = [(1, [10, 20]), (2, [11, 21]), (3, [12, 20]), (4, [11, 22]), (5, [12, 22]), (6, [13, 23])]
    assert find_duplicates(signatures_of(rows)).near.tolist() == [0, 0, 0, 0, 0, 5]


@pytest.mark.parametrize("band", range(BANDS))
def test_one_band_is_enough(band: int) -> None:
    rows = [(text, [100 * text + each if each != band else 7 for each in range(BANDS)]) for text in (1, 2)]
    assert find_duplicates(signatures_of(rows)).near.tolist() == [0, 0]


def test_a_key_counts_only_within_its_band() -> None:
    assert find_duplicates(signatures_of([(1, [10, 20]), (2, [20, 10])])).near.tolist() == [0, 1]


def test_clusters_are_those_of_plain_python() -> None:
    draw = np.random.default_rng(1)
    made = np.zeros((300, SIGNATURE_WIDTH), np.uint64)
    made[:, 0] = np.arange(300)
    made[:, 2:5] = draw.integers(1, 400, (300, 3))
    smallest = list(range(300))
    linked = [np.flatnonzero((made[:, 2:5] == row).any(axis=1)) for row in made[:, 2:5]]
    before: list[int] = []
    while smallest != before:
        before = smallest
        smallest = [min(before[other] for other in others) for others in linked]
    assert find_duplicates(made).near.tolist() == smallest
    assert len(set(smallest)) < 250


def test_no_documents() -> None:
    assert find_duplicates(np.zeros((0, SIGNATURE_WIDTH), np.uint64)).exact.tolist() == []


def test_signatures_never_change() -> None:
    """They are compared between runs and machines; a new formula needs a new name in the constants' seed."""
    signature = sign(b"the green river of seven boats met us on a cold morning", bands=True)
    assert [hex(int(value)) for value in signature[:4]] == GOLDEN
