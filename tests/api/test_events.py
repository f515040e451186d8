"""How a stream of events leaves: what is one write, and what waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from raymill.api.events import DONE, EventStream


def answer(make: Callable[[asyncio.Event], AsyncIterator[bytes]], timeout_s: float = 5.0) -> list[Any]:
    """What is sent, and when the event comes that `make` is given: a moment after the answer has begun."""

    async def run() -> list[Any]:
        found: list[Any] = []
        released = asyncio.Event()

        async def send(message: Any) -> None:
            found.append(message)

        async def receive() -> Any:
            await asyncio.sleep(0.05)
            found.append("released")
            released.set()
            await asyncio.Event().wait()

        await EventStream(make(released), lambda gone: found.append(gone), timeout_s)({}, receive, send)
        return found

    return asyncio.run(run())


def test_headers_go_with_the_first_event_and_the_last_one_ends_the_answer() -> None:
    async def events(released: asyncio.Event) -> AsyncIterator[bytes]:
        await released.wait()
        yield b"data: 1\n\n"
        yield b"data: 2\n\n" + DONE

    first, start, *bodies, gone = answer(events)
    assert first == "released", "nothing is sent before there is something to say"
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert [(body["body"], body["more_body"]) for body in bodies] == [
        (b"data: 1\n\n", True),
        (b"data: 2\n\ndata: [DONE]\n\n", False),
    ]
    assert gone is False


def test_a_stream_that_ran_out_of_time_before_its_first_event_is_an_answer_all_the_same() -> None:
    async def events(released: asyncio.Event) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    found = answer(events, timeout_s=0.01)
    assert found[0] is False, "its slot is free before the last word"
    assert found[1]["status"] == 200
    assert b"was not done within" in found[2]["body"]
    assert found[2]["body"].endswith(DONE) and found[2]["more_body"] is False
