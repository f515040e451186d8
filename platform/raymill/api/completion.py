"""A parsed request through the engine and back: one JSON answer, or server-sent events as the text is made.

When the client goes away, at any moment, or the request takes too long, every choice of it is aborted and its slots are
free. A stream that took too long ends with an error event, where its client still reads. Text that is
ready is written together: one event at most every `stream_interval_ms`, but the first token at once.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from raymill.api.responses import error_body
from raymill.api.schema import ChatRequest, CompletionRequest
from raymill.errors import RequestError
from raymill.inference.requests import Engine, Request, TokenEvent
from raymill.inference.sampling import Sampling
from raymill.inference.stream import Stream

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_LAST_WORD_S = 1.0


@dataclass(frozen=True)
class Prompt:
    """What the model continues."""

    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    field: str
    """The field it came from, for errors."""
    default_max_tokens: int
    """Tokens of a completion whose request does not say."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Completion:
    """One request in the engine: n choices of one prompt. `close` it whatever happens."""

    def __init__(self, engine: Engine, request: CompletionRequest | ChatRequest, prompt: Prompt) -> None:
        self._engine = engine
        self._chat = isinstance(request, ChatRequest)
        self._model = request.model
        self._prompt = prompt
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._usage_wanted = bool(request.stream_options and request.stream_options.include_usage)
        self._tokens = 0
        self.failed = False
        self._streams: list[Stream] = []
        try:
            for each in _choices(self.id, request, prompt, engine.max_seq_len):
                self._streams.append(engine.submit(each))
        except RequestError as error:
            self.close()
            if error.field == "prompt":
                error.field = prompt.field
            raise

    @property
    def usage(self) -> Usage:
        return Usage(len(self._prompt.ids), self._tokens)

    def close(self) -> None:
        """Frees the slots of choices that are not done."""
        for index in range(len(self._streams)):
            self._engine.abort(f"{self.id}-{index}")

    async def answer(self, on_first: Callable[[], None]) -> dict[str, Any]:
        """The whole answer. RequestError 500 or 503 when the engine gave up on it."""
        choices = []
        for index, stream in enumerate(self._streams):
            text, reason = self._join(await stream.finished())
            if index == 0:
                on_first()
            self._check(reason)
            choices.append(self._choice(index, text, reason, whole=True))
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage.body()}

    async def events(self, every_s: float, on_first: Callable[[], None]) -> AsyncIterator[bytes]:
        """The answer as server-sent events, ending with [DONE]; an error is an event too."""
        begun: set[int] = set()
        try:
            async for index, batch in _merged(self._streams, every_s):
                if not begun:
                    on_first()
                text, reason = self._join(batch)
                self._check(reason)
                if text or reason or index not in begun:
                    choice = self._choice(index, text, reason, whole=False, first=index not in begun)
                    yield self._event([choice])
                begun.add(index)
            if self._usage_wanted:
                yield self._event([], self.usage)
        except RequestError as error:
            yield _error_event(error)
        yield DONE

    def _join(self, batch: Sequence[TokenEvent]) -> tuple[str, str | None]:
        reason = batch[-1].finish_reason
        # The last event of an engine that gave up is no token.
        self._tokens += len(batch) - (reason in ("abort", "error"))
        return "".join(event.text for event in batch), reason

    def _check(self, reason: str | None) -> None:
        if reason == "error":
            self.failed = True
            raise RequestError("the model failed on this request", status=500, fix="send it again")
        if reason == "abort":
            raise RequestError("this replica is shutting down", status=503, fix="send the request again")

    def _head(self, kind: str) -> dict[str, Any]:
        name = kind if self._chat else "text_completion"
        return {"id": self.id, "object": name, "created": self._created, "model": self._model}

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        body = {**self._head("chat.completion.chunk"), "choices": choices}
        if self._usage_wanted:
            body["usage"] = usage.body() if usage else None
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _choice(self, index: int, text: str, reason: str | None, *, whole: bool, first: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
        if not self._chat:
            choice["text"] = text
        elif whole:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": text} if text or first else role
        return choice


class EventStream(Response):
    """A response of server-sent events that notices when its client goes away, even between two tokens."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[bool], None], timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone, timeout = True, None
        try:
            gone = await unless_gone(receive, self._send_all(send), self._timeout_s) is None
        except RequestError as error:
            gone, timeout = False, error
        finally:
            self._on_end(gone)
        if timeout is not None:
            with suppress(TimeoutError):  # a client that does not read is why it took so long
                await asyncio.wait_for(self._send_end(send, timeout), _LAST_WORD_S)

    async def _send_all(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return True

    async def _send_end(self, send: Send, error: RequestError) -> None:
        await send({"type": "http.response.body", "body": _error_event(error) + DONE})


async def unless_gone(receive: Receive, work: Awaitable[T], timeout_s: float) -> T | None:
    """The result of `work`, or None when the client went away first; `work` is cancelled then.

    RequestError 504 when neither happened in time.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        done, _ = await asyncio.wait({working, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            what = f"the completion was not done within {timeout_s:g} s"
            raise RequestError(what, status=504, fix="ask for fewer tokens, or when the endpoint has less to do")
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _error_event(error: RequestError) -> bytes:
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[Stream], every_s: float) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Batches of several streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for batch in streams[0].batches(every_s):
            yield 0, batch
        return
    queue: asyncio.Queue[tuple[int, list[TokenEvent]]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        async for batch in stream.batches(every_s):
            queue.put_nowait((index, batch))

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, batch = await queue.get()
            left -= batch[-1].finish_reason is not None
            yield index, batch
    finally:
        for task in pumps:
            task.cancel()


def _choices(
    completion_id: str, request: CompletionRequest | ChatRequest, prompt: Prompt, max_seq_len: int
) -> list[Request]:
    asked = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked = request.max_completion_tokens
    room = max_seq_len - len(prompt.ids)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt.ids)} tokens; the model takes {max_seq_len}, completion included",
            field="prompt",
            fix="shorten the prompt",
        )
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return [
        Request(
            id=f"{completion_id}-{index}",
            prompt_ids=prompt.ids,
            max_tokens=min(prompt.default_max_tokens, room) if asked is None else asked,
            sampling=Sampling(
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k,
                seed=seed + (index << 64),  # past any seed a request can name: choices never share draws
            ),
            stop=tuple(request.stop or ()),
            stop_ids=prompt.stop_ids,
        )
        for index in range(request.n or 1)
    ]
