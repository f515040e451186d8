"""Server-sent events, and how an answer under way ends: done, its client gone, or out of time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from raymill.api.responses import error_body
from raymill.errors import RequestError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_LAST_WORD_S = 1.0
_WRITES_PER_S = 640


def write_interval_s(interval_s: float, streams: int) -> float:
    """How long text of one of `streams` open streams is gathered before it is written: longer where there are many.

    A write that wakes its reader costs 60 us, most of it in the kernel, and 10 where another woke it: so all streams are
    written at once, in whole multiples of the interval.
    """
    return interval_s * math.ceil(max(1.0, streams / _WRITES_PER_S / interval_s)) if interval_s else 0.0


class EventStream(Response):
    """A response of server-sent events that notices when its client goes away, even between two tokens."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[bool], None], timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._timeout_s = timeout_s
        self._started = False

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
                await asyncio.wait_for(self._send_event(send, error_event(timeout) + DONE), _LAST_WORD_S)

    async def _send_all(self, send: Send) -> bool:
        async for event in self._events:
            await self._send_event(send, event)
        return True

    async def _send_event(self, send: Send, event: bytes) -> None:
        """The headers go with the first: alone they would wake everyone on the way, and until then nothing has been answered."""
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": event, "more_body": not event.endswith(DONE)})


async def unless_gone(receive: Receive, work: Awaitable[T], timeout_s: float) -> T | None:
    """The result of `work`, or None when the client went away first; `work` is cancelled then.

    RequestError 504 when neither happened in time.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        done, _ = await asyncio.wait({working, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            what = f"the request was not done within {timeout_s:g} s"
            raise RequestError(what, status=504, fix="ask for less, or when the endpoint has less to do")
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed."""
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
