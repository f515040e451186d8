"""Does LSH find what theory says? Hit rate by exact Jaccard similarity, over all pairs of some thousand documents.

A pair is hit when its signatures share a band key. With 14 bands of 8 minima theory says 1 - (1 - J^8)^14. The number of
hits of a bin is a sum of independent draws, one per pair with its own J; a bin is inside when the number found lies in
the middle 95.45 % (2 sigma) of that sum's exact distribution. Of 16 bins about one in twenty falls outside by chance.
Shingles are made here a second time, in Python: word 5-grams, a word being a run of letters, digits and other
non-ASCII bytes, case folded in ASCII, a number read as 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.corpus import Library, edit

LOWEST, BINS = 0.2, 16
BANDS, ROWS, SHINGLE_WORDS = 14, 8, 5
_TAIL = 0.02275
_WINDOW_CHARS = 1500
_WORD = re.compile(rb"[a-z0-9\x80-\xff]+")


@dataclass(frozen=True)
class Bin:
    """Pairs whose similarity lies in one range."""

    low: float
    high: float
    pairs: int
    hits: int
    expected: float
    """Hits by theory."""
    inside: bool


def measure(library: Library, documents: int, seed: int = 1) -> list[Bin]:
    """Signs that many documents, half of them edits of the other half, and compares all pairs."""
    from raymill.corpus.dedup import sign

    texts = family_texts(library, documents, seed)
    keys = np.array([sign(text.encode(), bands=True)[-BANDS:] for text in texts])
    pairs, similarity = similar_pairs([shingles(text) for text in texts])
    hit = ((keys[pairs[:, 0]] == keys[pairs[:, 1]]) & (keys[pairs[:, 0]] != 0)).any(axis=1)
    edges = np.linspace(LOWEST, 1.0, BINS + 1)
    place = np.minimum(np.searchsorted(edges, similarity, side="right") - 1, BINS - 1)
    bins = []
    for index in range(BINS):
        chance = theory(similarity[place == index])
        hits = int(hit[place == index].sum())
        low, high = float(edges[index]), float(edges[index + 1])
        bins.append(Bin(low, high, len(chance), hits, float(chance.sum()), is_likely(hits, chance)))
    return bins


def family_texts(library: Library, documents: int, seed: int) -> list[str]:
    """Pairs: a text and its edit, similarities spread over the bins.

    No paragraph is in two pairs, so that their hits are independent draws; a small library gives fewer documents.
    """
    source = random.Random(seed)
    windows: list[str] = []
    held: list[str] = []
    for paragraph in library.paragraphs:
        held.append(paragraph)
        if sum(map(len, held)) >= _WINDOW_CHARS:
            windows.append("\n".join(held)[: 2 * _WINDOW_CHARS])
            held = []
    source.shuffle(windows)
    pairs = ((text, edit(text, source.uniform(LOWEST, 1.0), source, library)) for text in windows[: documents // 2])
    return [text for pair in pairs for text in pair]


def shingles(text: str) -> set[tuple[bytes, ...]]:
    data = text.encode()
    words = [re.sub(rb"[0-9]+", b"0", word) for word in _WORD.findall(data.lower())]
    return set(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))


def similar_pairs(sets: Sequence[set[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every pair (i < j) with a similarity of at least LOWEST, and that similarity, by counting shared shingles."""
    holders: dict[Any, list[int]] = {}
    for index, each in enumerate(sets):
        for shingle in each:
            holders.setdefault(shingle, []).append(index)
    codes = []
    for listed in holders.values():
        if len(listed) > 1:
            first, second = np.triu_indices(len(listed), 1)
            members = np.array(listed)
            codes.append(members[first] * len(sets) + members[second])
    pairs, shared = np.unique(np.concatenate([np.empty(0, np.int64), *codes]), return_counts=True)
    both = np.stack([pairs // len(sets), pairs % len(sets)], axis=1)
    sizes = np.array([len(each) for each in sets])
    similarity = shared / (sizes[both[:, 0]] + sizes[both[:, 1]] - shared)
    wanted = similarity >= LOWEST
    return both[wanted], similarity[wanted]


def theory(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 1 - (1 - similarity**ROWS) ** BANDS
    return result


def is_likely(hits: int, chance: NDArray[np.float64]) -> bool:
    """Whether that many hits lie in the middle 95.45 % of what these chances give together."""
    distribution = np.ones(1)
    for each in chance:
        distribution = np.append(distribution, 0.0) * (1 - each) + np.append(0.0, distribution) * each
    return bool(distribution[: hits + 1].sum() >= _TAIL and distribution[hits:].sum() >= _TAIL)
