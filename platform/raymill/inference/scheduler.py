"""Continuous batching: which tokens of which requests go through the model in the next step, and in which pages.

There is no prefill phase and no decode phase. Each sequence has ids (prompt, then completion) and a count of those the
model has seen; a step feeds every running sequence some of the ids it has not seen yet. A running completion has one
such id (and perhaps a draft of the next ones), a new prompt many. Completions always fit, so a long prompt never stops a
stream: what is left of the step's token budget is given to prompts, oldest first, in chunks. The step that feeds a
sequence's last known id yields its next one.

Slots bound the sequences that run, pages the memory they take. A sequence takes pages as it grows, and before it computes
a full page it looks whether another has computed the same one. When pages run out the youngest running sequence goes back
to the head of the queue and is computed again later, its completion so far included. Order is by arrival throughout:
whoever runs is older than whoever waits, the oldest is never sent back, so everyone comes to an end.

Plain data, no model, no clock: the same submissions give the same plan everywhere. About 2 us a sequence and step.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from raymill.errors import RequestError
from raymill.inference.kv_cache import PAGE_TOKENS, PageKey, PagePool, first_key, next_key, pages_for
from raymill.inference.speculation import DRAFT_ROWS, MOST_SEQUENCES, PromptLookup
from raymill.inference.step import Chunk, PageTable


@dataclass(eq=False)
class Progression:
    """One request on its way through the model."""

    request_id: str
    ids: list[int]
    """Prompt, then completion."""
    max_ids: int
    """As many as prompt and completion may become."""
    adapter: int = 0
    outputs_from: int | None = None
    """Positions from here on must be computed for what the model says there: logits, to score a prompt, or hidden
    states. None: only what follows the last id counts."""
    wants_hidden: bool = False
    lookup: PromptLookup | None = None
    """Drafts; None has none."""
    slot: int | None = None
    """Where it runs; None while it waits, and when it is done."""
    computed_tokens: int = 0
    """How many of `ids` are in the KV cache."""
    pages: list[int] = field(default_factory=list)
    keys: list[PageKey] = field(default_factory=list)
    """Of the full pages of `ids`, as far as they were needed."""
    named_pages: int = 0
    """So many of its pages, from the first, can be found by others."""


@dataclass(frozen=True)
class Plan:
    """One step: chunks in the order of the model's rows (single ids first), each with its sequence."""

    sequences: list[Progression]
    chunks: list[Chunk]


class Scheduler:
    """Slots, pages and the queue in front of them."""

    def __init__(self, num_slots: int, max_queued: int, max_step_tokens: int, num_pages: int, max_seq_len: int) -> None:
        """max_queued: requests that may wait; one more is refused with 429. max_step_tokens: rows of one step."""
        assert max_step_tokens > num_slots, "a prompt must make progress beside a full house"
        self.num_slots, self.max_queued, self.max_step_tokens = num_slots, max_queued, max_step_tokens
        self.pool = PagePool(num_pages)
        self.queued: deque[Progression] = deque()
        self.running: list[Progression] = []
        """Oldest first."""
        self.preemptions = 0
        """Sequences sent back since the start."""
        self._free_slots = list(range(num_slots))
        self.table: PageTable = np.zeros((num_slots, pages_for(max_seq_len)), np.int32)

    def add(self, sequence: Progression) -> None:
        """Queues a sequence. RequestError: 429 when it would have to wait behind too many, 400 when it can never fit."""
        if _most_pages(sequence) > self.pool.num_pages:
            raise RequestError(
                f"the prompt and max_tokens are {sequence.max_ids} tokens together; the KV cache holds "
                f"{self.pool.num_pages * PAGE_TOKENS}",
                field="max_tokens",
                fix="shorten the prompt or lower max_tokens",
            )
        self.queued.append(sequence)
        self._admit()
        if len(self.queued) > self.max_queued and self.queued[-1] is sequence:
            self.queued.pop()
            raise RequestError(
                f"{len(self.running)} requests are running and {self.max_queued} wait",
                status=429,
                fix="wait for the Retry-After seconds, then send the request again",
            )

    def remove(self, sequence: Progression, *, failed: bool = False) -> None:
        """Takes a sequence out wherever it is. Its pages stay to be found again, but not where its step failed."""
        if sequence.slot is None:
            self.queued.remove(sequence)
            return
        if failed:
            self.pool.forget(sequence.pages)
        self._stop(sequence, keep=not failed)
        self._admit()

    def clear(self) -> None:
        """Takes every sequence out."""
        self.queued.clear()
        while self.running:
            self._stop(self.running[-1], keep=False)

    def plan(self) -> Plan:
        """The next step. `settle` what came of it, or remove its sequences, before the next one."""
        if self.queued:
            self._admit()
        singles: list[Progression] = []
        longer: list[Progression] = []
        single_chunks: list[Chunk] = []
        longer_chunks: list[Chunk] = []
        prompts = sum(not _decodes(sequence) for sequence in self.running)
        left = self.max_step_tokens - (len(self.running) - prompts)
        drafts = 0 if prompts or len(self.running) > MOST_SEQUENCES else DRAFT_ROWS // max(1, len(self.running)) - 1
        at = 0
        while at < len(self.running):  # preemption takes from the end: never one that is planned already
            sequence = self.running[at]
            at += 1
            if _decodes(sequence):
                if sequence.computed_tokens >= PAGE_TOKENS * len(sequence.pages) and not self._grow(sequence, 1):
                    break
                chunk = self._decode(sequence, min(drafts, left)) if drafts else _single(sequence)
                left -= len(chunk.ids) - 1
            else:
                if not left:
                    continue
                self._share(sequence)
                count = _piece(sequence, left)
                if not self._grow(sequence, count):
                    break
                left -= count
                chunk = _feed(sequence, count)
            if len(chunk.ids) == 1:
                singles.append(sequence)
                single_chunks.append(chunk)
            else:
                longer.append(sequence)
                longer_chunks.append(chunk)
        return Plan(singles + longer, single_chunks + longer_chunks)

    def settle(self, sequence: Progression, chunk: Chunk) -> None:
        """The step fed the chunk; the ids it gave stand behind the sequence's, and what of a draft was wrong does not."""
        if sequence.slot is None:  # removed meanwhile
            return
        sequence.computed_tokens = min(chunk.start + len(chunk.ids), len(sequence.ids) - 1)
        if sequence.outputs_from is not None:
            sequence.outputs_from = max(sequence.outputs_from, sequence.computed_tokens)

    def _admit(self) -> None:
        """Gives free slots to the oldest who wait, while there are pages for all they have, and one more for each who
        may need it: whoever is let in shall not be sent back at once."""
        while self._free_slots and self.queued:
            sequence = self.queued[0]
            if self.running:
                missing = sum(_next_pages(each) - len(each.pages) for each in self.running)
                if _next_pages(sequence) - self._held_by_others(sequence) > self.pool.available - missing:
                    return
            self.queued.popleft()
            sequence.slot = heapq.heappop(self._free_slots)  # the lowest: used rows of the table stay together
            self.running.append(sequence)

    def _held_by_others(self, sequence: Progression) -> int:
        """Pages of its beginning that running sequences hold."""
        count = 0
        while count < _shareable(sequence) and self.pool.is_held(_key(sequence, count)):
            count += 1
        return count

    def _share(self, sequence: Progression) -> None:
        """Takes over pages that were computed before, from where the sequence stands."""
        if sequence.computed_tokens != PAGE_TOKENS * len(sequence.pages):
            return
        while len(sequence.pages) < _shareable(sequence):
            page = self.pool.share(_key(sequence, len(sequence.pages)))
            if page is None:
                return
            self._append(sequence, page)
            sequence.computed_tokens += PAGE_TOKENS
            sequence.named_pages = len(sequence.pages)

    def _grow(self, sequence: Progression, count: int) -> bool:
        """Takes the pages for `count` more positions; False when the sequence itself had to give way."""
        self._name_full_pages(sequence)
        for _ in range(pages_for(sequence.computed_tokens + count) - len(sequence.pages)):
            while not self.pool.available:
                youngest = self.running[-1]
                self._stop(youngest, keep=True)
                self.preemptions += 1
                youngest.computed_tokens = 0
                self.queued.appendleft(youngest)
                if youngest is sequence:
                    return False
            self._append(sequence, self.pool.take())
        return True

    def _decode(self, sequence: Progression, most: int) -> Chunk:
        """The last id and a draft, as long as it needs no one else's page and the request may still take it."""
        if sequence.lookup is None:
            return _single(sequence)
        most = min(most, sequence.max_ids - len(sequence.ids) - 1)
        if not self.pool.available:
            most = min(most, PAGE_TOKENS * len(sequence.pages) - sequence.computed_tokens - 1)
        draft = sequence.lookup.draft(sequence.ids, most)
        if not draft:
            return _single(sequence)
        grown = self._grow(sequence, 1 + len(draft))
        assert grown and sequence.slot is not None
        ids = (sequence.ids[-1], *draft)
        return Chunk(sequence.slot, sequence.computed_tokens, ids, len(ids), sequence.adapter)

    def _append(self, sequence: Progression, page: int) -> None:
        self.table[sequence.slot, len(sequence.pages)] = page
        sequence.pages.append(page)

    def _stop(self, sequence: Progression, *, keep: bool) -> None:
        if keep:
            self._name_full_pages(sequence)
        self.running.remove(sequence)
        assert sequence.slot is not None
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        self.pool.release(sequence.pages)
        sequence.pages.clear()
        sequence.named_pages = 0

    def _name_full_pages(self, sequence: Progression) -> None:
        for index in range(sequence.named_pages, sequence.computed_tokens // PAGE_TOKENS):
            self.pool.name(sequence.pages[index], _key(sequence, index))
            sequence.named_pages = index + 1


def _decodes(sequence: Progression) -> bool:
    """Whether a single row is all it waits for."""
    return len(sequence.ids) - sequence.computed_tokens == 1 and not sequence.wants_hidden


def _most_pages(sequence: Progression) -> int:
    return pages_for(sequence.max_ids)


def _next_pages(sequence: Progression) -> int:
    """Pages for all it has, and one more where it may need one."""
    return min(_most_pages(sequence), pages_for(len(sequence.ids)) + 1)


def _shareable(sequence: Progression) -> int:
    """Pages it may take from others: the last id is always computed, and what outputs are wanted of."""
    last = len(sequence.ids) - 1
    return (last if sequence.outputs_from is None else min(last, sequence.outputs_from)) // PAGE_TOKENS


def _key(sequence: Progression, index: int) -> PageKey:
    """What page `index` of the sequence holds."""
    keys, ids = sequence.keys, sequence.ids
    while len(keys) <= index:
        before = keys[-1] if keys else first_key(sequence.adapter)
        keys.append(next_key(before, ids[len(keys) * PAGE_TOKENS : (len(keys) + 1) * PAGE_TOKENS]))
    return keys[index]


def _single(sequence: Progression) -> Chunk:
    assert sequence.slot is not None
    return Chunk(sequence.slot, sequence.computed_tokens, (sequence.ids[-1],), 1, sequence.adapter)


def _piece(sequence: Progression, left: int) -> int:
    """How many ids to feed: not across the point from which hidden states are wanted, because a chunk gives all or none."""
    count = min(len(sequence.ids) - sequence.computed_tokens, left)
    if sequence.wants_hidden and sequence.outputs_from is not None:
        behind = sequence.outputs_from - sequence.computed_tokens
        return min(count, behind) if behind > 0 else count
    return count


def _feed(sequence: Progression, count: int) -> Chunk:
    start, wanted = sequence.computed_tokens, sequence.outputs_from
    end = start + count
    ids = tuple(sequence.ids[start:end])
    assert sequence.slot is not None
    if sequence.wants_hidden:
        assert wanted is not None
        return Chunk(sequence.slot, start, ids, 0, sequence.adapter, wants_hidden=start >= wanted)
    num_logits = int(end == len(sequence.ids)) if wanted is None else max(0, end - max(start, wanted))
    return Chunk(sequence.slot, start, ids, num_logits, sequence.adapter)
