import asyncio
import statistics
import sys
import threading

import pytest

from raymill.inference.requests import TokenEvent
from raymill.inference.stream import Stream, wake

COUNT = 5_000


@pytest.fixture(autouse=True)
def threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def write(streams):
    """As the engine does: a step's events to all streams, then one waking."""
    for n in range(COUNT):
        reason = "length" if n == COUNT - 1 else None
        waiters = [stream.add(TokenEvent(str(n), reason)) for stream in streams]
        wake([waiter for waiter in waiters if waiter is not None])


def in_order(events):
    return [event.text for event in events] == [str(n) for n in range(COUNT)]


@pytest.mark.parametrize("every_s", [0.0, 0.001])
def test_no_event_is_lost_between_a_writer_and_readers_that_sleep(every_s):
    async def read(stream):
        return [event async for batch in stream.batches(every_s) for event in batch]

    async def both(streams):
        writer = threading.Thread(target=write, args=(streams,))
        writer.start()
        found = await asyncio.wait_for(asyncio.gather(*(read(stream) for stream in streams)), 60)
        writer.join()
        return found

    assert all(map(in_order, asyncio.run(both([Stream(), Stream()]))))


def test_no_event_is_lost_on_the_way_to_a_thread():
    stream, found = Stream(), []
    reader = threading.Thread(target=lambda: found.extend(event for batch in stream for event in batch))
    reader.start()
    write([stream])
    reader.join(60)
    assert in_order(found)


def test_an_event_loop_is_woken_once_for_all_its_readers():
    async def main():
        loop, calls = asyncio.get_running_loop(), []
        inner = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), inner(*args))
        streams = [Stream() for _ in range(8)]
        readers = [asyncio.create_task(stream.finished()) for stream in streams]
        await asyncio.sleep(0)
        assert [stream.add(TokenEvent("a")) for stream in streams] == [None] * 8, "they wait for the end"
        wake([stream.add(TokenEvent("b", "stop")) for stream in streams])
        assert len(calls) == 1
        return [len(events) for events in await asyncio.gather(*readers)]

    assert asyncio.run(main()) == [2] * 8


def test_what_was_there_before_its_reader_is_read_without_waiting():
    async def main():
        first, second = Stream(), Stream()
        for stream in (first, second):
            [stream.put(TokenEvent(text, reason)) for text, reason in [("a", None), ("b", "stop")]]
        batches = [batch async for batch in first.batches(every_s=9)]
        return [len(batch) for batch in batches], len(await second.finished())

    assert asyncio.run(asyncio.wait_for(main(), 5)) == ([2], 2)


def test_streams_of_one_interval_are_read_at_the_same_moments():
    """Whoever reads what they write is woken once for all."""
    every_s = 0.1

    async def read(stream, phases):
        loop = asyncio.get_running_loop()
        async for _ in stream.batches(every_s):
            phases.append(loop.time() % every_s)

    async def both():
        loop, streams, found = asyncio.get_running_loop(), [Stream(), Stream()], [[], []]
        readers = []
        for stream, phases, begin_s in zip(streams, found, (0.04, 0.07), strict=True):
            await asyncio.sleep(every_s - loop.time() % every_s + begin_s)
            readers.append(asyncio.create_task(read(stream, phases)))
            stream.add(TokenEvent("a"))
            await asyncio.sleep(0)
        for _ in range(70):
            await asyncio.sleep(0.01)
            wake([waiter for stream in streams if (waiter := stream.add(TokenEvent("b"))) is not None])
        wake([waiter for stream in streams if (waiter := stream.add(TokenEvent("c", "stop"))) is not None])
        await asyncio.gather(*readers)
        return found

    for phases in asyncio.run(both()):
        assert phases[0] > 0.03, "the first is read at once"
        assert len(phases) > 5 and statistics.median(phases[1:-1]) < 0.03
