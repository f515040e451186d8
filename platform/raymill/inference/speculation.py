"""Several tokens from one step: a draft is copied from what was already said, and the step checks it.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): text often repeats what its prompt or its
own beginning says, so what followed the last GRAM_TOKENS ids when they last occurred is a guess for what follows now. A
draft's token is kept only when the sampler, given the step's logits, takes the same one, so the text is that of no
speculation, to the bit, greedy or seeded.

Where it pays. A step of 8 rows of one sequence takes 2 times as long as one of 1 row at 12.6 M parameters (int8, native, 0.33
and 0.66 ms on one core) and 1.8 times at 125 M; beyond 8 rows time grows with the rows. So a step has at most DRAFT_ROWS
rows, at most MOST_SEQUENCES sequences are running, and a request tries only while its drafts are kept: of 7 drafted
tokens 1 must be right to lose nothing, a share of 0.14. After misses it waits, twice as long each time, so that text
without repetition pays for few checks: at most 8 of its first 500 tokens.

Cost: about 1 us a token, and 0.3 us for each id of the prompt, once, when the request first runs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM_TOKENS = 3
"""Ids that must have occurred before: two meet by chance too often, four are rarely met."""
DRAFT_ROWS = 8
MOST_SEQUENCES = 2
_LEAST_KEPT = 0.2
_WEIGHT = 0.4
"""Of the newest draft in the running share that was kept."""
_FIRST_PAUSE_TOKENS = 16
_LONGEST_PAUSE_TOKENS = 512


class PromptLookup:
    """Drafts for one request."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = GRAM_TOKENS
        self._kept = 0.5  # the first draft is tried, and a second one if the first was not all wrong
        self._waits_until = 0
        self._pause = _FIRST_PAUSE_TOKENS

    def draft(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """At most so many ids that may follow; none where nothing is known or it does not pay now."""
        if most < 1 or len(ids) < max(self._waits_until, GRAM_TOKENS):
            return ()
        for end in range(self._seen, len(ids)):
            self._after[tuple(ids[end - GRAM_TOKENS : end])] = end
        self._seen = max(self._seen, len(ids))
        at = self._after.get(tuple(ids[-GRAM_TOKENS:]))
        if at is None:
            return ()
        found = tuple(ids[at : at + most])
        while len(found) < most:  # it reaches the present: what repeats once may go on repeating
            found += found[: most - len(found)]
        return found

    def learn(self, ids: Sequence[int], drafted: int, kept: int) -> None:
        """What became of a draft; `ids` as they are now."""
        self._kept += _WEIGHT * (kept / drafted - self._kept)
        if self._kept >= _LEAST_KEPT:
            self._pause = _FIRST_PAUSE_TOKENS
            return
        self._waits_until = len(ids) + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_TOKENS)
        self._kept = _LEAST_KEPT  # the next draft alone decides
