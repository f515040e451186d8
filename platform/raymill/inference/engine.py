"""The engine: one thread that turns submitted requests into streams of text, many at a time.

    engine.submit(request) -> Stream     raises RequestError: outside the model's limits (400), queue full (429)
    for batch in stream                  lists of TokenEvent: all that is ready, so that one write can carry many;
                                         `batches` and `finished` are the same for event loops
    engine.embed(ids) -> Future          a text's embedding; it shares steps with completions
    engine.abort(request.id)             the client went away: the slot is free before the next step

Callers may live in any thread and any event loop. A step that fails ends the requests that were in it with finish_reason
"error"; logits that are not finite and a token that cannot be turned into text end their own request so. Three such steps
in a row make the engine unhealthy, and so does a step that does not come back, and the end of its thread, which ends every
stream: a replica should then be replaced. A grammar that allows no token ends its own request so too, but whoever sent it
says nothing about the replica.

What the engine adds to a model step: 12-16 us for one sequence, 5 us a token for 32 (greedy, no reader waiting;
behind a step that fills the CPU's caches 2-4 times that).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from raymill.errors import RequestError
from raymill.inference import native
from raymill.inference.adapters import Adapter
from raymill.inference.answers import Completion, Embedding
from raymill.inference.compiled_draws import is_finite
from raymill.inference.limits import check_adapter, check_ids, check_request
from raymill.inference.requests import EngineStats, FinishReason, Request, TokenEvent
from raymill.inference.sampling import NO_TOKEN, choose
from raymill.inference.scheduler import Plan, Progression, Scheduler
from raymill.inference.speculation import PromptLookup
from raymill.inference.step import Chunk, Floats, ModelStep
from raymill.inference.stream import Stream, Waiter, wake
from raymill.inference.text import Decoder

_UNHEALTHY_AFTER = 3
_STEP_S = 120.0
"""A step that runs for longer hangs: one that reads 28 GB, 7 B parameters in fp32, takes some 10 s on a slow machine."""
_ROW_S = 1.0
"""Unless it has more rows than seconds: 7 B parameters are 14 GFLOP a row, which a slow core does in about a second."""
_log = logging.getLogger(__name__)


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
        adapters: Mapping[str, Adapter] | None = None,
        on_stats: Callable[[EngineStats], None] | None = None,
    ) -> None:
        """adapters: LoRA adapters by the name that requests call them. on_stats: told when the numbers change."""
        native.library()  # choosing tokens is compiled too, once per node: not while the first client waits
        self._step = step
        self._make_decoder = make_decoder
        self._scheduler = Scheduler(num_slots, max_queued, max_step_tokens, step.num_pages, step.max_seq_len)
        self._adapters = {name: step.load_adapter(each.tensors, each.scale) for name, each in (adapters or {}).items()}
        self._on_stats = on_stats
        self._reported: EngineStats | None = None
        self._answers: dict[Progression, Completion | Embedding] = {}
        self._by_id: dict[str, Completion] = {}
        self._woken: list[Waiter] = []
        self._failures_in_a_row = 0
        self._under_way: tuple[float, Plan] | None = None
        """When the step that runs began, and what it does."""
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
        """LoRA adapters that requests may name."""
        return tuple(self._adapters)

    def submit(self, request: Request) -> Stream:
        """Queues a request and returns the stream of its events."""
        check_request(request, self.max_seq_len, self.vocab_size)
        scores = request.prompt_logprobs is not None
        sequence = Progression(
            request.id,
            list(request.prompt_ids),
            len(request.prompt_ids) + request.max_tokens,
            self._adapter(request.adapter),
            outputs_from=0 if scores else None,
            lookup=PromptLookup(),
        )
        completion = Completion(request, sequence, self._make_decoder())
        with self._work:
            assert request.id not in self._by_id, "request ids are unique"
            self._enter(sequence, completion)
            self._by_id[request.id] = completion
        return completion.stream

    def embed(self, ids: tuple[int, ...], adapter: str | None = None) -> Future[Floats]:
        """Queues a text; its mean hidden state, of length 1. Cancelling the future takes it out."""
        check_ids(ids, 0, self.max_seq_len, self.vocab_size)
        sequence = Progression("", list(ids), len(ids), self._adapter(adapter), outputs_from=0, wants_hidden=True)
        embedding = Embedding(sequence)
        with self._work:
            self._enter(sequence, embedding)
        embedding.future.add_done_callback(lambda future: self._drop(embedding) if future.cancelled() else None)
        return embedding.future

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is. Does nothing when it is done or unknown."""
        with self._work:
            completion = self._by_id.get(request_id)
            if completion is not None:
                self._finish(completion, completion.without_token("abort"))
        self._wake()

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
        self._wake()

    def _enter(self, sequence: Progression, answer: Completion | Embedding) -> None:
        if self._closed:
            raise RequestError("this replica is shutting down", status=503, fix="send the request again")
        if self._ended:
            raise RequestError("this replica does not work", status=503, fix="send the request again")
        self._scheduler.add(sequence)
        self._answers[sequence] = answer
        self._work.notify()

    def _adapter(self, name: str | None) -> int:
        check_adapter(name, self._adapters)
        return 0 if name is None else self._adapters[name]

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
            self._wake()

    def _take_step(self) -> bool:
        """Waits for work and does one step of it; False when the engine is closed."""
        with self._work:
            while not self._closed and not self._scheduler.running:
                self._work.wait()
            if self._closed:
                return False
            plan = self._scheduler.plan()
            self._under_way = time.monotonic(), plan
        failed = False
        try:
            self._run(plan)
        except Exception:  # whatever a step raises must reach its clients, not end the thread
            _log.exception("a step with %d chunks failed", len(plan.chunks))
            failed = True
        with self._work:
            self._under_way = None
            whole = self._fail(plan) if failed else self._deliver(plan)
            self._failures_in_a_row = 0 if whole else self._failures_in_a_row + 1
        self._wake()
        self._report()
        return True

    def _run(self, plan: Plan) -> None:
        """One model step; every answer takes what it gave."""
        output = self._step(plan.chunks, self._scheduler.table)
        askers: list[Completion] = []
        chunks: list[Chunk] = []
        logits_row = hidden_row = 0
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            answer = self._answers.get(sequence)
            if isinstance(answer, Completion):
                if answer.read(chunk, output.logits_NV, logits_row):
                    askers.append(answer)
                    chunks.append(chunk)
            elif answer is not None and chunk.wants_hidden:
                assert output.hidden_ND is not None
                answer.read(output.hidden_ND[hidden_row : hidden_row + len(chunk.ids)])
            logits_row += chunk.num_logits
            hidden_row += len(chunk.ids) if chunk.wants_hidden else 0
        self._choose(output.logits_NV, askers, chunks)

    def _choose(self, logits_NV: Floats, askers: list[Completion], chunks: list[Chunk]) -> None:
        """The next tokens. A draft's are chosen one after the other, each as if the step had been for it alone: the
        next is asked for while they are the drafted ones."""
        ahead = 0
        while askers:
            rows = [asker.logits_row + ahead for asker in askers]
            chosen = choose(logits_NV, rows, [asker.sampler for asker in askers])
            going_on: list[Completion] = []
            their_chunks: list[Chunk] = []
            for asker, chunk, row, (token, logprob) in zip(askers, chunks, rows, chosen, strict=True):
                accepted = asker.accept(token, logprob)
                if token == NO_TOKEN:
                    asker.stuck = asker.request.grammar is not None and is_finite(logits_NV[row])
                at = len(asker.sequence.ids) + ahead - chunk.start
                if accepted and at < len(chunk.ids) and chunk.ids[at] == token:
                    going_on.append(asker)
                    their_chunks.append(chunk)
            askers, chunks = going_on, their_chunks
            ahead += 1

    def _deliver(self, plan: Plan) -> bool:
        """Hands out what the step gave; False when one of its requests could not take it, by no fault of its own."""
        whole = True
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            answer = self._answers.get(sequence)
            if answer is None:  # aborted while the step ran
                continue
            try:
                if isinstance(answer, Embedding):
                    taken = self._take_embedding(answer, chunk)
                else:
                    taken = self._advance(answer, chunk)
            except Exception:  # a token that is no text must not stop the others
                _log.exception("a token could not be delivered")
                taken = False
            if not taken:
                whole = whole and isinstance(answer, Completion) and answer.stuck
                self._give_up(answer)
        return whole

    def _advance(self, completion: Completion, chunk: Chunk) -> bool:
        """Puts a completion's new tokens into its stream."""
        if completion.failed:
            return False
        sequence, taken = completion.sequence, completion.taken
        known = len(sequence.ids)
        for token, logprob in taken:
            sequence.ids.append(token)
            event = completion.event(token, logprob)
            if event.finish_reason is not None:
                self._scheduler.settle(sequence, chunk)
                self._finish(completion, event)
                return True
            waiter = completion.stream.add(event)
            if waiter is not None:
                self._woken.append(waiter)
        drafted = chunk.start + len(chunk.ids) - known
        if drafted > 0 and sequence.lookup is not None:
            sequence.lookup.learn(sequence.ids, drafted, len(taken) - 1)
        taken.clear()
        self._scheduler.settle(sequence, chunk)
        if completion.request.max_tokens == 0 and chunk.start + len(chunk.ids) == known:
            self._finish(completion, completion.without_token("length"))
        return True

    def _take_embedding(self, embedding: Embedding, chunk: Chunk) -> bool:
        sequence = embedding.sequence
        self._scheduler.settle(sequence, chunk)
        if chunk.start + len(chunk.ids) < len(sequence.ids):
            return True
        if not embedding.is_finite:
            return False
        self._drop(embedding)
        embedding.finish()
        return True

    def _fail(self, plan: Plan) -> bool:
        for sequence in plan.sequences:
            answer = self._answers.get(sequence)
            if answer is not None:
                self._give_up(answer)
        return False

    def _give_up(self, answer: Completion | Embedding) -> None:
        if isinstance(answer, Completion):
            self._finish(answer, answer.without_token("error"), failed=True)
        else:
            self._drop(answer, failed=True)
            answer.fail("the model failed on this text")

    def _finish(self, completion: Completion, last: TokenEvent, *, failed: bool = False) -> None:
        self._drop(completion, failed=failed)
        self._by_id.pop(completion.request.id, None)
        waiter = completion.stream.add(last)
        if waiter is not None:
            self._woken.append(waiter)

    def _drop(self, answer: Completion | Embedding, *, failed: bool = False) -> None:
        with self._work:  # from a future's thread, or again from the engine's
            if self._answers.pop(answer.sequence, None) is not None:
                self._scheduler.remove(answer.sequence, failed=failed)

    def _finish_all(self, reason: FinishReason) -> None:
        """Ends every stream, whatever state the scheduler is in: nothing runs after it."""
        answers = list(self._answers.values())
        self._answers.clear()
        self._by_id.clear()
        for answer in answers:
            if isinstance(answer, Embedding):
                answer.fail("this replica is shutting down")
            else:
                answer.stream.put(answer.without_token(reason))
        self._scheduler.clear()

    def _wake(self) -> None:
        """Wakes the readers of what was delivered, without the lock: each event loop once."""
        if self._woken:
            with self._work:
                woken, self._woken = self._woken, []
            wake(woken)

    def _report(self) -> None:
        """Tells the state when it changed."""
        if self._on_stats is None:
            return
        with self._work:
            stats = self._stats()
        if stats == self._reported:
            return
        self._reported = stats
        try:
            self._on_stats(stats)
        except Exception:  # counting is not worth a completion
            _log.exception("the engine's state cannot be reported, and is not any more")
            self._on_stats = None

    def _stats(self) -> EngineStats:
        active = len(self._scheduler.running)
        works = not self._closed and not self._ended and self._thread.is_alive()
        healthy = works and self._failures_in_a_row < _UNHEALTHY_AFTER and not self._hangs()
        scheduler = self._scheduler
        return EngineStats(len(scheduler.queued), active, scheduler.num_slots, healthy, scheduler.preemptions)

    def _hangs(self) -> bool:
        """Whether the step that runs should have ended."""
        if self._under_way is None:
            return False
        began, plan = self._under_way
        took_s = time.monotonic() - began
        return took_s > _STEP_S and took_s > _ROW_S * sum(len(chunk.ids) for chunk in plan.chunks)
