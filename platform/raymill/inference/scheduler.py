"""Continuous batching: which tokens of which requests go through the model in the next step.

There is no prefill phase and no decode phase. Each sequence has ids (prompt, then completion) and a count of those the
model has seen; a step feeds every running sequence some of the ids it has not seen yet. A running completion has one
such id, a new prompt many. Completions go first, so that a long prompt never stops a stream: what is left of the
step's token budget is given to prompts, oldest first, in chunks. The step that feeds a sequence's last known id yields
its next one.

Plain data, no model, no clock: the same submissions give the same plan everywhere.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from raymill.errors import RequestError
from raymill.inference.kv_cache import pages_for
from raymill.inference.step import Chunk, PageTable


@dataclass
class Progression:
    """One request on its way through the model."""

    request_id: str
    ids: list[int]
    """Prompt, then completion."""
    prompt_tokens: int
    slot: int | None = None
    computed_tokens: int = 0
    """How many of `ids` are in the KV cache."""


@dataclass(frozen=True)
class Plan:
    """One step: chunks in the order of the model's rows, each with its sequence."""

    sequences: tuple[Progression, ...]
    chunks: tuple[Chunk, ...]


@dataclass
class Scheduler:
    """Slots and the queue in front of them."""

    num_slots: int
    max_queued: int
    """Requests that may wait for a slot; one more is refused with 429."""
    max_step_tokens: int
    """Rows of one step; running completions always fit."""
    num_pages: int
    """Pages of the KV cache."""
    max_seq_len: int
    queued: deque[Progression] = field(default_factory=deque)
    running: list[Progression] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.max_step_tokens > self.num_slots, "a prompt must make progress beside a full house"
        whole = pages_for(self.max_seq_len)
        self.num_slots = min(self.num_slots, self.num_pages // whole)
        self._free = list(range(self.num_slots))
        self.table: PageTable = np.arange(self.num_slots * whole, dtype=np.int32).reshape(self.num_slots, whole)

    def add(self, sequence: Progression) -> None:
        """Queues a sequence. RequestError 429 when slots and queue are full."""
        if not self._free and len(self.queued) >= self.max_queued:
            raise RequestError(
                f"all {self.num_slots} slots are taken and {self.max_queued} requests wait",
                status=429,
                fix="wait for the Retry-After seconds, then send the request again",
            )
        self.queued.append(sequence)
        self._fill_slots()

    def remove(self, request_id: str) -> None:
        """Takes a sequence out wherever it is and frees its slot; unknown ids are ignored."""
        for sequence in self.running:
            if sequence.request_id == request_id:
                assert sequence.slot is not None
                heapq.heappush(self._free, sequence.slot)
                self.running.remove(sequence)
                break
        else:
            self.queued = deque(sequence for sequence in self.queued if sequence.request_id != request_id)
        self._fill_slots()

    def clear(self) -> None:
        """Takes every sequence out and frees every slot."""
        self.queued.clear()
        self.running.clear()
        self._free = list(range(self.num_slots))

    def plan(self) -> Plan:
        """The next step. Marks what it feeds as computed: a step that fails must fail its sequences."""
        decoding = [sequence for sequence in self.running if _unseen(sequence) == 1]
        prompts = [sequence for sequence in self.running if _unseen(sequence) > 1]
        left = self.max_step_tokens - len(decoding)
        sequences, chunks = [], []
        for sequence in [*decoding, *prompts]:
            count = 1 if _unseen(sequence) == 1 else min(_unseen(sequence), left)
            if count == 0:
                break
            left -= count if _unseen(sequence) > 1 else 0
            sequences.append(sequence)
            chunks.append(_feed(sequence, count))
        return Plan(tuple(sequences), tuple(chunks))

    def _fill_slots(self) -> None:
        while self._free and self.queued:
            sequence = self.queued.popleft()
            sequence.slot = heapq.heappop(self._free)  # the lowest: used slots stay together in the KV cache
            self.running.append(sequence)


def _unseen(sequence: Progression) -> int:
    return len(sequence.ids) - sequence.computed_tokens


def _feed(sequence: Progression, count: int) -> Chunk:
    start = sequence.computed_tokens
    sequence.computed_tokens += count
    assert sequence.slot is not None
    ids = tuple(sequence.ids[start : start + count])
    return Chunk(sequence.slot, start, ids, num_logits=int(sequence.computed_tokens == len(sequence.ids)))
