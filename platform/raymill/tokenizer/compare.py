"""Tokenizers side by side on the same texts: how short they make each source, how fast, how much of them is used.

In: tokenizers by name, texts by source. Out: one row per tokenizer, in the order given; nothing is printed. Costs one
encoding of all texts per tokenizer, after one of the first texts that is not timed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raymill.tokenizer.tokenizer import Tokenizer

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class SourceRow:
    """What one tokenizer makes of one source."""

    bytes_per_token: float
    """UTF-8 bytes of text that one token stands for; 0 where there is no text."""
    fertility: float
    """Tokens per word, a word being a run of anything but white space; 0 where there is none."""


@dataclass(frozen=True)
class Row:
    """One tokenizer."""

    name: str
    vocab_size: int
    bytes_per_token: float
    """Over all sources."""
    sources: Mapping[str, SourceRow]
    """By source."""
    mb_per_s: float
    """Text encoded per second of this process's CPU time, MB/s."""
    used_share: float
    """Share of the vocabulary that occurs in these texts, 0 to 1."""


def compare(tokenizers: Mapping[str, Tokenizer], texts_by_source: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row per tokenizer. Only `mb_per_s` differs from one call to the next."""
    text_bytes = {name: sum(len(text.encode()) for text in texts) for name, texts in texts_by_source.items()}
    words = {name: sum(_count_words(text) for text in texts) for name, texts in texts_by_source.items()}
    rows = []
    for name, tokenizer in tokenizers.items():
        _warm(tokenizer, texts_by_source)
        used = np.zeros(tokenizer.vocab_size, np.bool_)
        tokens, cpu_s = {}, 0.0
        for source, texts in texts_by_source.items():
            start_s = time.process_time()
            ids, _ = tokenizer.encode_flat(texts)
            cpu_s += time.process_time() - start_s
            used[ids] = True
            tokens[source] = len(ids)
        rows.append(
            Row(
                name=name,
                vocab_size=tokenizer.vocab_size,
                bytes_per_token=_ratio(sum(text_bytes.values()), sum(tokens.values())),
                sources={
                    source: SourceRow(_ratio(text_bytes[source], count), _ratio(count, words[source]))
                    for source, count in tokens.items()
                },
                mb_per_s=_ratio(sum(text_bytes.values()) / 1e6, cpu_s),
                used_share=float(used.mean()),
            )
        )
    return rows


def _warm(tokenizer: Tokenizer, texts_by_source: Mapping[str, Sequence[str]]) -> None:
    """Loads what is loaded once per process."""
    tokenizer.encode_flat([texts[0] for texts in texts_by_source.values() if texts])


def _count_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else 0.0
