"""A completion as it comes: events put by the engine's thread, read by one other thread or one event loop.

Cost of an event: 0.2 us where no one waits for it. Waking a reader costs as much as making the token (5-20 us), so the
engine wakes once a step, all readers of one event loop together (`add`, then `wake`), and a reader says what it waits for.

No lock: the writer first appends, then looks who waits; the reader first says that it waits, then looks what is there.
Whatever happens between, one of them sees the other.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from raymill.inference.requests import TokenEvent


@dataclass(frozen=True, eq=False)
class Waiter:
    """A reader that sleeps until it is woken."""

    woken: threading.Event | asyncio.Future[None]
    until_finished: bool


class Stream:
    """The events of one request. Read it once, from one thread or one event loop."""

    __slots__ = ("_ready", "_waiter")

    def __init__(self) -> None:
        self._ready: deque[TokenEvent] = deque()
        self._waiter: Waiter | None = None

    def add(self, event: TokenEvent) -> Waiter | None:
        """Called by the engine's thread. Gives back who must be woken."""
        self._ready.append(event)
        waiter = self._waiter
        if waiter is None or (waiter.until_finished and event.finish_reason is None):
            return None
        self._waiter = None
        return waiter

    def put(self, event: TokenEvent) -> None:
        """`add`, and wakes whoever waits for it."""
        waiter = self.add(event)
        if waiter is not None:
            wake([waiter])

    def __iter__(self) -> Iterator[list[TokenEvent]]:
        finished = False
        while not finished:
            woken = threading.Event()
            self._waiter = Waiter(woken, until_finished=False)
            if not self._ready:
                woken.wait()
            self._waiter = None
            batch = self._take()
            finished = batch[-1].finish_reason is not None
            yield batch

    async def batches(self, every_s: float = 0.0) -> AsyncIterator[list[TokenEvent]]:
        """What is ready, at most once in `every_s`, but the first and the last at once.

        Streams of one `every_s` share their moments, the multiples of it: who reads them all is woken once for all.
        """
        finished, loop = False, asyncio.get_running_loop()
        while not finished:
            await self._wait(until_finished=False, timeout_s=None)
            batch = self._take()
            finished = batch[-1].finish_reason is not None
            yield batch
            if every_s and not finished:
                await self._wait(until_finished=True, timeout_s=every_s - loop.time() % every_s)

    async def finished(self) -> list[TokenEvent]:
        """Every event, once the last is there."""
        await self._wait(until_finished=True, timeout_s=None)
        return self._take()

    async def _wait(self, *, until_finished: bool, timeout_s: float | None) -> None:
        # A future and a timer: asyncio.wait_for makes a task, which costs 30 us.
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._waiter = Waiter(woken, until_finished)
        timer = None
        try:
            if self._ready and (not until_finished or self._ready[-1].finish_reason is not None):
                return
            if timeout_s is not None:
                timer = loop.call_later(timeout_s, _set, woken)
            await woken
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _take(self) -> list[TokenEvent]:
        """What is there now; the writer may add more at any moment."""
        return [self._ready.popleft() for _ in range(len(self._ready))]


def wake(waiters: Iterable[Waiter]) -> None:
    """Wakes readers; each event loop is disturbed once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if isinstance(waiter.woken, threading.Event):
            waiter.woken.set()
        else:
            by_loop.setdefault(waiter.woken.get_loop(), []).append(waiter.woken)
    for loop, futures in by_loop.items():
        with suppress(RuntimeError):  # it is closed: no one waits any more
            loop.call_soon_threadsafe(_set, *futures)


def _set(*futures: asyncio.Future[None]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
