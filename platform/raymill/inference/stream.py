"""A completion as it comes: events put by the engine's thread, read by one other thread or one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

from raymill.inference.requests import TokenEvent


class Stream:
    """The events of one request. Read it once, from one thread or one event loop."""

    def __init__(self) -> None:
        self._ready: deque[TokenEvent] = deque()
        self._changed = threading.Condition()
        self._waiter: _Waiter | None = None

    def put(self, event: TokenEvent) -> None:
        """Called by the engine's thread."""
        finished = event.finish_reason is not None
        waiter = None
        with self._changed:
            self._ready.append(event)
            self._changed.notify_all()
            if self._waiter is not None and (finished or not self._waiter.until_finished):
                waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(RuntimeError):  # its loop is closed: no one waits any more
                waiter.loop.call_soon_threadsafe(waiter.woken.set)

    def __iter__(self) -> Iterator[list[TokenEvent]]:
        finished = False
        while not finished:
            with self._changed:
                self._changed.wait_for(lambda: self._ready)
                batch = self._take()
            finished = batch[-1].finish_reason is not None
            yield batch

    async def batches(self, every_s: float = 0.0) -> AsyncIterator[list[TokenEvent]]:
        """What is ready, at most once in `every_s`, but the first and the last at once.

        Each token that wakes the event loop costs about as much as making it.
        """
        finished = False
        while not finished:
            await self._wait(until_finished=False, timeout_s=None)
            batch = self._take()
            finished = batch[-1].finish_reason is not None
            yield batch
            if every_s and not finished:
                await self._wait(until_finished=True, timeout_s=every_s)

    async def finished(self) -> list[TokenEvent]:
        """Every event, once the last is there."""
        await self._wait(until_finished=True, timeout_s=None)
        return self._take()

    async def _wait(self, *, until_finished: bool, timeout_s: float | None) -> None:
        waiter = _Waiter(asyncio.get_running_loop(), asyncio.Event(), until_finished)
        with self._changed:
            if self._ready and (not until_finished or self._ready[-1].finish_reason is not None):
                return
            self._waiter = waiter
        with suppress(TimeoutError):
            await asyncio.wait_for(waiter.woken.wait(), timeout_s)

    def _take(self) -> list[TokenEvent]:
        with self._changed:
            batch = list(self._ready)
            self._ready.clear()
        return batch


@dataclass(frozen=True)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Event
    until_finished: bool
