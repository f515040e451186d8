"""The engine: one thread that turns submitted requests into streams of text, many at a time.

    engine.submit(request) -> Stream     raises RequestError: outside the model's limits (400), queue full (429)
    for batch in stream                  lists of TokenEvent: all that is ready, so that one write can carry many;
                                         `batches` and `finished` are the same for event loops
    engine.abort(request.id)             the client went away: the slot is free before the next step

Callers may live in any thread and any event loop. A step that fails (or gives NaN) ends the requests that were in it with
finish_reason "error"; a token that cannot be turned into text ends its own request so. Three such steps in a row make the
engine unhealthy, and so does the end of its thread, which ends every stream: a replica should then be replaced.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from raymill.errors import RequestError
from raymill.inference.requests import EngineStats, FinishReason, Request, TokenEvent
from raymill.inference.sampling import Sampler, Sampling, choose
from raymill.inference.scheduler import Plan, Progression, Scheduler
from raymill.inference.step import Floats, ModelStep, is_finite
from raymill.inference.stream import Stream
from raymill.inference.text import Decoder, TextStream

_UNHEALTHY_AFTER = 3
_log = logging.getLogger(__name__)


@dataclass
class _Running:
    """What the engine remembers of a request that the scheduler does not need."""

    request: Request
    progression: Progression
    stream: Stream
    text: TextStream
    sampler: Sampler


class BatchingEngine:
    """`Engine` over a model step. `close` it when done; it ends every open stream."""

    def __init__(
        self,
        step: ModelStep,
        make_decoder: Callable[[], Decoder],
        *,
        num_slots: int,
        max_queued: int,
        max_step_tokens: int,
        on_stats: Callable[[EngineStats], None] | None = None,
    ) -> None:
        self._step = step
        self._make_decoder = make_decoder
        self._scheduler = Scheduler(num_slots, max_queued, max_step_tokens, step.num_pages, step.max_seq_len)
        self._on_stats = on_stats
        self._requests: dict[str, _Running] = {}
        self._failures_in_a_row = 0
        self._work = threading.Condition()
        self._closed = False
        self._ended = False  # the thread takes no more work
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def max_seq_len(self) -> int:
        """Prompt and completion together may have this many tokens."""
        return self._step.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self._step.vocab_size

    @property
    def adapters(self) -> tuple[str, ...]:
        return ()

    def embed(self, ids: tuple[int, ...], adapter: str | None = None) -> Future[Floats]:
        raise NotImplementedError

    def submit(self, request: Request) -> Stream:
        """Queues a request and returns the stream of its events."""
        self._check(request)
        progression = Progression(request.id, list(request.prompt_ids), len(request.prompt_ids))
        match = request.grammar.start() if request.grammar else None
        sampler = Sampler(request.sampling, request.prompt_ids, match, request.logprobs)
        running = _Running(request, progression, Stream(), TextStream(self._make_decoder(), request.stop), sampler)
        with self._work:
            if self._closed:
                raise RequestError("this replica is shutting down", status=503, fix="send the request again")
            if self._ended:
                raise RequestError("this replica does not work", status=503, fix="send the request again")
            assert request.id not in self._requests, "request ids are unique"
            self._scheduler.add(progression)
            self._requests[request.id] = running
            self._work.notify()
        return running.stream

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is. Does nothing when it is done or unknown."""
        with self._work:
            running = self._requests.get(request_id)
            if running is not None:
                self._finish(running, "", "abort")

    def stats(self) -> EngineStats:
        with self._work:
            return self._stats()

    def close(self) -> None:
        """Stops the thread; open streams end with finish_reason "abort"."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()
        with self._work:
            self._finish_all("abort")

    def _check(self, request: Request) -> None:
        prompt, limit = len(request.prompt_ids), self._step.max_seq_len
        if not prompt:
            raise RequestError("the prompt is empty", field="prompt", fix="send at least one token")
        if request.max_tokens < 1 or prompt + request.max_tokens > limit:
            raise RequestError(
                f"the prompt has {prompt} tokens and max_tokens is {request.max_tokens}; together they may be {limit}",
                field="max_tokens",
                fix=f"shorten the prompt, or set max_tokens to at most {max(0, limit - prompt)}",
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._step.vocab_size:
            raise RequestError(f"a prompt id is outside 0..{self._step.vocab_size - 1}", field="prompt")

    def _loop(self) -> None:
        try:
            while self._take_step():
                pass
        except Exception:  # a bug of ours: whoever waits must hear of it
            _log.exception("the engine ends")
        finally:
            with self._work:
                self._ended = True
                if not self._closed:  # else `close` ends the streams
                    self._finish_all("error")

    def _take_step(self) -> bool:
        """Waits for work and does one step of it; False when the engine is closed."""
        with self._work:
            self._work.wait_for(lambda: self._closed or self._scheduler.running)
            if self._closed:
                return False
            plan = self._scheduler.plan()
        try:
            chosen = self._run(plan)
        except Exception:  # whatever a step raises must reach its clients, not end the thread
            _log.exception("a step with %d chunks failed", len(plan.chunks))
            chosen = None
        with self._work:
            whole = self._fail(plan) if chosen is None else self._deliver(plan, chosen)
            self._failures_in_a_row = 0 if whole else self._failures_in_a_row + 1
            stats = self._stats()
        self._report(stats)
        return True

    def _report(self, stats: EngineStats) -> None:
        if self._on_stats is None:
            return
        try:
            self._on_stats(stats)
        except Exception:  # counting is not worth a completion
            _log.exception("the engine's state cannot be reported, and is not any more")
            self._on_stats = None

    def _run(self, plan: Plan) -> list[int]:
        """One model step; the next ids of the plan's finished chunks in order."""
        output = self._step(plan.chunks, self._scheduler.table)
        if not is_finite(output):
            raise FloatingPointError("the model gave NaN or infinite logits")
        samplers = []
        for progression, chunk in zip(plan.sequences, plan.chunks, strict=True):
            if chunk.num_logits:
                running = self._requests.get(progression.request_id)
                samplers.append(running.sampler if running else Sampler(Sampling(temperature=0)))
        return [token for token, _ in choose(output.logits_NV, range(len(samplers)), samplers)]

    def _deliver(self, plan: Plan, chosen: list[int]) -> bool:
        """Hands each token to its request; False when one of them could not take it."""
        whole = True
        finished_chunks = (p for p, chunk in zip(plan.sequences, plan.chunks, strict=True) if chunk.num_logits)
        for progression, token in zip(finished_chunks, chosen, strict=True):
            running = self._requests.get(progression.request_id)
            if running is None:  # aborted while the step ran
                continue
            try:
                self._advance(running, token)
            except Exception:  # a token that is no text must not stop the others
                _log.exception("a token could not be delivered")
                self._finish(running, "", "error")
                whole = False
        return whole

    def _advance(self, running: _Running, token: int) -> None:
        running.sampler.push(token)
        running.progression.ids.append(token)
        made = len(running.progression.ids) - running.progression.prompt_tokens
        if token in running.request.stop_ids:
            self._finish(running, running.text.finish(), "stop")
            return
        text = running.text.push(token)
        if running.text.stopped:
            self._finish(running, text, "stop")
        elif made == running.request.max_tokens:
            text += running.text.finish()
            self._finish(running, text, "stop" if running.text.stopped else "length")
        else:
            running.stream.put(TokenEvent(text))

    def _fail(self, plan: Plan) -> bool:
        for progression in plan.sequences:
            running = self._requests.get(progression.request_id)
            if running is not None:
                self._finish(running, "", "error")
        return False

    def _finish(self, running: _Running, text: str, reason: FinishReason) -> None:
        if self._requests.pop(running.request.id, None) is not None:
            running.stream.put(TokenEvent(text, reason))
            self._scheduler.remove(running.request.id)

    def _finish_all(self, reason: FinishReason) -> None:
        """Ends every stream, whatever state the scheduler is in: nothing runs after it."""
        for running in self._requests.values():
            running.stream.put(TokenEvent("", reason))
        self._requests.clear()
        self._scheduler.clear()

    def _stats(self) -> EngineStats:
        active = len(self._scheduler.running)
        works = not self._closed and not self._ended and self._thread.is_alive()
        healthy = works and self._failures_in_a_row < _UNHEALTHY_AFTER
        return EngineStats(len(self._scheduler.queued), active, self._scheduler.num_slots, healthy)
