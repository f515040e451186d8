"""Fakes for the engine: letters for ids, and a model that says the alphabet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from raymill.inference.step import Chunk, PageTable, StepOutput


class Letters:
    """id 0 is the end; id n is the n-th letter."""

    def push(self, token: int) -> str:
        return chr(96 + token)

    def finish(self) -> str:
        return ""


class Alphabet:
    """A model that is sure the next id is the last one plus one. Remembers every step it was asked for."""

    def __init__(self, num_pages: int = 8, max_seq_len: int = 64, vocab_size: int = 27) -> None:
        self.num_pages, self.max_seq_len, self.vocab_size = num_pages, max_seq_len, vocab_size
        self.steps: list[tuple[Chunk, ...]] = []
        self.fail_next = 0

    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> StepOutput:
        self.steps.append(tuple(chunks))
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("out of luck")
        wanted = [token for chunk in chunks for token in chunk.ids[len(chunk.ids) - chunk.num_logits :]]
        logits = np.zeros((len(wanted), self.vocab_size), np.float32)
        for row, token in enumerate(wanted):
            logits[row, (token + 1) % self.vocab_size] = 9.0
        return StepOutput(logits)


@pytest.fixture
def letters() -> type[Letters]:
    return Letters


@pytest.fixture
def alphabet() -> type[Alphabet]:
    return Alphabet
