"""Fakes for the engine: letters for ids, and a model that says the alphabet."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from raymill.inference.scheduler import Chunk


class Letters:
    """id 0 is the end; id n is the n-th letter."""

    def push(self, token: int) -> str:
        return chr(96 + token)

    def finish(self) -> str:
        return ""


class Alphabet:
    """A model that is sure the next id is the last one plus one. Remembers every step it was asked for."""

    def __init__(self, num_slots: int = 4, max_seq_len: int = 64, vocab_size: int = 27) -> None:
        self.num_slots, self.max_seq_len, self.vocab_size = num_slots, max_seq_len, vocab_size
        self.steps: list[tuple[Chunk, ...]] = []
        self.fail_next = 0

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        self.steps.append(tuple(chunks))
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("out of luck")
        wanted = [chunk for chunk in chunks if chunk.wants_logits]
        logits = torch.zeros(len(wanted), self.vocab_size)
        for row, chunk in enumerate(wanted):
            logits[row, (chunk.ids[-1] + 1) % self.vocab_size] = 9.0
        return logits


@pytest.fixture
def letters() -> type[Letters]:
    return Letters


@pytest.fixture
def alphabet() -> type[Alphabet]:
    return Alphabet
