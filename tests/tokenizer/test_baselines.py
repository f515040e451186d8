"""The two figures a model must beat, against figures worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import zstandard

from raymill.tokenizer import baselines
from raymill.tokenizer.baselines import unigram_bits_per_byte, zstd_bits_per_byte


def test_unigram() -> None:
    train, val = np.array([5, 2, 0]), np.array([1, 1, 2])
    bits = -(math.log2(6 / 10) + math.log2(3 / 10) + 2 * math.log2(1 / 10))
    assert unigram_bits_per_byte(train, val, 20) == pytest.approx(bits / 20)


def test_zstd_reads_the_texts_as_one() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice("abcdef") for _ in range(1000))] * 3
    size = len(zstandard.ZstdCompressor(level=19).compress("".join(texts).encode()))
    assert zstd_bits_per_byte(texts) == pytest.approx(8 * size / 3000, rel=0.02)
    assert zstd_bits_per_byte(texts) < 0.5 * zstd_bits_per_byte(texts[:1])


def test_zstd_reads_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "ZSTD_LIMIT_BYTES", 1500)
    noise = random.Random(0).randbytes(1000).hex()
    assert zstd_bits_per_byte(["a" * 1000, "a" * 500 + noise]) < 0.2
    assert zstd_bits_per_byte(["a" * 1400, "a" * 100, noise]) < 0.2
