"""Benchmarks are run from the repository root, so that is where they are imported from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.data.corpus import Library

_WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "window", "paper")
_LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture
def library() -> Library:
    """200 paragraphs of 40 words, none like another."""
    texts = []
    for number in range(200):
        mark = _LETTERS[number % 20] + _LETTERS[number // 20]
        words = (f"{_WORDS[place % 8]}{mark}{_LETTERS[place // 8]}" for place in range(40))
        texts.append(" ".join(words) + ".")
    return Library(tuple(texts), "test")
