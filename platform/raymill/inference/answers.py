"""What comes of one request while it runs: a completion's events, or an embedding.

The engine's thread gives an answer the rows that a step computed for it, without the engine's lock (`read`, `accept`);
then, under the lock, what was taken becomes events. Nothing here knows slots, pages or other requests.

Cost of a token: about 2 us without stop strings and log probabilities.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from raymill.errors import RequestError
from raymill.inference.requests import FinishReason, Request, TokenEvent
from raymill.inference.sampling import NO_TOKEN, Sampler, TokenLogprob, score
from raymill.inference.scheduler import Progression
from raymill.inference.step import Chunk, Floats
from raymill.inference.stream import Stream
from raymill.inference.text import Decoder, TextStream

_log = logging.getLogger(__name__)


class Completion:
    """A request on its way to its text."""

    __slots__ = (
        *("_prompt", "failed", "logits_row", "made", "request", "sampler"),
        *("sequence", "stream", "stuck", "taken", "text"),
    )

    def __init__(self, request: Request, sequence: Progression, decoder: Decoder) -> None:
        self.request, self.sequence = request, sequence
        self.stream = Stream()
        self.text = TextStream(decoder, request.stop)
        match = request.grammar.start() if request.grammar else None
        self.sampler = Sampler(request.sampling, request.prompt_ids, match, request.logprobs)
        self.made = 0
        """Tokens of the completion."""
        self.taken: list[tuple[int, TokenLogprob | None]] = []
        """The step's tokens that are not delivered yet."""
        self.failed = False
        """No token could be taken."""
        self.stuck = False
        """And only because of the grammar: nothing is wrong with the model."""
        self.logits_row = 0
        """The step's row that says the next token; those of a draft follow it."""
        self._prompt: list[TokenLogprob] | None = None
        if request.prompt_logprobs is not None:
            self._prompt = [TokenLogprob(request.prompt_ids[0], None)]

    def read(self, chunk: Chunk, logits_NV: Floats, first_row: int) -> bool:
        """Takes the prompt's scores from a step; whether the step says a next token too."""
        end, known = chunk.start + len(chunk.ids), len(self.sequence.ids)
        rows, prompt = chunk.num_logits, self.request.prompt_ids
        self.logits_row = first_row
        if rows and self._prompt is not None and len(self._prompt) < len(prompt):
            position = end - rows
            targets = prompt[position + 1 : end + 1]
            scored_NV = logits_NV[first_row : first_row + len(targets)]
            self.failed = not bool(np.isfinite(scored_NV).all())
            if self.failed:
                return False
            self._prompt += score(scored_NV, targets, self.request.prompt_logprobs or 0)
            self.logits_row += len(targets)
        return rows > 0 and end >= known and self.request.max_tokens > 0

    def accept(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Takes a chosen token; whether the completion may go on behind it."""
        if token == NO_TOKEN:
            self.failed = True
            return False
        self.taken.append((token, logprob))
        if token in self.request.stop_ids:
            return False
        try:
            self.sampler.push(token)
        except Exception as error:  # most often too complex to follow any further; no reason to stop the others
            _log.warning("a completion's grammar refused its token", exc_info=not isinstance(error, ValueError))
            self.failed = self.stuck = True
        return not self.failed

    def event(self, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """What one token adds. Its finish_reason is set when it is the last."""
        self.made += 1
        reason: FinishReason | None = None
        if token in self.request.stop_ids:
            text, reason = self.text.finish(), "stop"
        else:
            text = self.text.push(token)
            if self.text.stopped:
                reason = "stop"
            elif self.made == self.request.max_tokens:
                text += self.text.finish()
                reason = "stop" if self.text.stopped else "length"
        if self._prompt is None:
            return TokenEvent(text, reason, logprob)
        return TokenEvent(text, reason, logprob, self._take_prompt())

    def without_token(self, reason: FinishReason) -> TokenEvent:
        """The last event of a request whose end is no token."""
        prompt, stuck = self._take_prompt() if reason == "length" else None, self.stuck and reason == "error"
        return TokenEvent("", reason, prompt=prompt, counts=False, stuck=stuck)

    def _take_prompt(self) -> tuple[TokenLogprob, ...] | None:
        prompt, self._prompt = self._prompt, None
        return None if prompt is None else tuple(prompt)


class Embedding:
    """A text on its way to the mean of its hidden states."""

    def __init__(self, sequence: Progression) -> None:
        self.sequence = sequence
        self.future: Future[Floats] = Future()
        self._total_D: NDArray[np.float64] | None = None

    def read(self, hidden_ND: Floats) -> None:
        """Adds a chunk's hidden states. Added row by row in fp64, so the sum does not depend on the chunks."""
        rows_ND = hidden_ND.astype(np.float64)
        if self._total_D is not None:
            rows_ND = np.concatenate([self._total_D[None], rows_ND])
        self._total_D = np.add.reduce(rows_ND, axis=0)

    @property
    def is_finite(self) -> bool:
        return self._total_D is not None and bool(np.isfinite(self._total_D).all())

    def finish(self) -> None:
        """Scaling to length 1 makes the mean of the sum."""
        assert self._total_D is not None
        length = np.linalg.norm(self._total_D)
        vector = (self._total_D / (length or 1.0)).astype(np.float32)
        with suppress(InvalidStateError):  # cancelled meanwhile
            self.future.set_result(vector)

    def fail(self, what: str) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(RequestError(what, status=503, fix="send the request again"))
