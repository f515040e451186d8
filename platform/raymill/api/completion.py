"""A parsed request through the engine and back: one JSON answer, or server-sent events as the text is made.

A request may ask for many completions (n of each prompt). At most as many as the engine has slots are in it at once, the
others enter as those end; if the first ones do not all fit into its queue, the request is refused whole (429). When the
client goes away, at any moment, or the request takes too long, every completion of it is aborted and its slots are free.
Text that is ready is written together: one event at most every `stream_interval_ms`, but the first token at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from raymill.api.choices import Choice
from raymill.api.events import DONE, error_event
from raymill.errors import RequestError
from raymill.inference.limits import check_request
from raymill.inference.requests import Engine, Request, TokenEvent
from raymill.inference.stream import Stream

T = TypeVar("T")
_RETRY_S = 0.02


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; a prompt counts once, however often it is continued."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True)
class Asked:
    """One choice: what the engine is asked for, and how its answer is written."""

    request: Request
    choice: Choice


@dataclass(frozen=True)
class Head:
    """What an answer and all its events begin with."""

    completion_id: str
    model: str


class Completion:
    """All choices of one request, in the engine. `close` it whatever happens."""

    def __init__(
        self,
        engine: Engine,
        head: Head,
        asked: Sequence[Asked],
        prompt_tokens: int,
        *,
        stream_usage: bool,
        on_first: Callable[[], None],
    ) -> None:
        """RequestError where one of them is outside the model's limits or the first do not fit. stream_usage: a stream ends
        with the token counts. on_first: told when the first token is there."""
        self._engine, self._asked, self._stream_usage, self._on_first = engine, asked, stream_usage, on_first
        self._prompt_tokens, self._tokens = prompt_tokens, 0
        self._head = {"id": head.completion_id, "object": "", "created": int(time.time()), "model": head.model}
        self.failed = self._begun = False
        self._streams: dict[int, Stream] = {}
        for each in asked:
            check_request(each.request, engine.max_seq_len, engine.vocab_size)
        self._at_once = max(1, engine.stats().num_slots)
        try:
            for number, each in enumerate(asked[: self._at_once]):
                self._streams[number] = engine.submit(each.request)
        except RequestError:
            self.close()
            raise

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._tokens)

    def close(self) -> None:
        """Frees the slots of choices that are not done."""
        for number in self._streams:
            self._engine.abort(self._asked[number].request.id)

    async def answer(self) -> dict[str, Any]:
        """The whole answer. RequestError (400, 500 or 503) when the engine gave up on it."""
        choices: list[dict[str, Any]] = [{}] * len(self._asked)
        async for number, events in self._merged(None):
            self._count(events)
            choices[number] = self._asked[number].choice.whole(events)
        head = {**self._head, "object": self._asked[0].choice.WHOLE}
        return {**head, "choices": choices, "usage": self.usage.body()}

    async def events(self, every_s: float) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error is an event too. The last come together, with [DONE] behind them."""
        self._head["object"] = self._asked[0].choice.PART
        last, left = b"", len(self._asked)
        try:
            async for number, events in self._merged(every_s):
                self._count(events)
                choice = self._asked[number].choice.part(events)
                event = b"" if choice is None else self._event([choice], None)
                left -= events[-1].finish_reason is not None
                if not left:
                    last = event
                elif event:
                    yield event
            if self._stream_usage:
                last += self._event([], self.usage.body())
        except RequestError as error:
            last = error_event(error)
        yield last + DONE

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        body = {**self._head, "choices": choices}
        if self._stream_usage:
            body["usage"] = usage
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _count(self, events: Sequence[TokenEvent]) -> None:
        last = events[-1]
        if not self._begun:
            self._begun = True
            self._on_first()
        self._tokens += len(events) - (not last.counts)
        if last.stuck:  # 400: clients send again what fails with 500
            what = "no token conforms to the schema here, or it became too complex to follow"
            raise RequestError(what, field="response_format", fix="simplify the schema")
        if last.finish_reason == "error":
            self.failed = True
            raise RequestError("the model failed on this request", status=500, fix="send it again")
        if last.finish_reason == "abort":
            raise RequestError("this replica is shutting down", status=503, fix="send the request again")

    async def _merged(self, every_s: float | None) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
        """Events of all choices as they come, each with its choice's number; all of a choice together without every_s."""
        if len(self._asked) == 1:
            async for events in _batches(self._streams[0], every_s):
                yield 0, events
            return
        queue: asyncio.Queue[tuple[int, list[TokenEvent]] | RequestError] = asyncio.Queue()

        async def pump(first: int) -> None:
            try:
                for number in range(first, len(self._asked), self._at_once):
                    async for events in _batches(await self._stream(number), every_s):
                        queue.put_nowait((number, events))
            except RequestError as error:
                queue.put_nowait(error)

        pumps = [asyncio.ensure_future(pump(first)) for first in self._streams]
        try:
            left = len(self._asked)
            while left:
                came = await queue.get()
                if isinstance(came, RequestError):
                    raise came
                left -= came[1][-1].finish_reason is not None
                yield came
        finally:
            for task in pumps:
                task.cancel()

    async def _stream(self, number: int) -> Stream:
        """The stream of a choice, which enters the engine now if it is not there."""
        if number not in self._streams:
            request = self._asked[number].request
            self._streams[number] = await when_there_is_room(lambda: self._engine.submit(request))
        return self._streams[number]


async def when_there_is_room(submit: Callable[[], T]) -> T:
    """What `submit` gives, once the engine's queue is not full."""
    while True:
        try:
            return submit()
        except RequestError as error:
            if error.status != 429:
                raise
        await asyncio.sleep(_RETRY_S)


async def _batches(stream: Stream, every_s: float | None) -> AsyncIterator[list[TokenEvent]]:
    if every_s is None:
        yield await stream.finished()
        return
    async for events in stream.batches(every_s):
        yield events
