import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from raymill.errors import RequestError
from raymill.inference.engine import BatchingEngine
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.inference.step import StepOutput

GREEDY = Sampling(temperature=0)


@pytest.fixture
def engine_of(letters):
    made = []

    def make(step, **changes):
        settings = {"num_slots": 4, "max_queued": 2, "max_step_tokens": 16, **changes}
        made.append(BatchingEngine(step, letters, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def request(name="r", prompt=(1,), max_tokens=3, **changes):
    return Request(id=name, prompt_ids=tuple(prompt), max_tokens=max_tokens, sampling=GREEDY, **changes)


def becomes(true):
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def read(stream):
    events = asyncio.run(asyncio.wait_for(stream.finished(), timeout=10))
    return "".join(event.text for event in events), events[-1].finish_reason, len(events)


class Gate:
    """Lets a step through only when told; everything else is the inner model's."""

    def __init__(self, inner):
        self.inner, self.entered, self.open = inner, threading.Semaphore(0), threading.Semaphore(0)
        self.num_pages, self.max_seq_len, self.vocab_size = inner.num_pages, inner.max_seq_len, inner.vocab_size

    def __call__(self, chunks, table):
        self.entered.release()
        assert self.open.acquire(timeout=10)
        return self.inner(chunks, table)


def test_a_completion_ends_at_max_tokens(engine_of, alphabet):
    assert read(engine_of(alphabet()).submit(request(prompt=[1, 2]))) == ("cde", "length", 3)


def test_a_completion_ends_at_a_stop_id_which_is_counted_but_not_shown(engine_of, alphabet):
    stream = engine_of(alphabet()).submit(request(max_tokens=20, stop_ids=frozenset({5})))
    assert read(stream) == ("bcd", "stop", 4)


def test_a_completion_ends_before_a_stop_string(engine_of, alphabet):
    assert read(engine_of(alphabet()).submit(request(max_tokens=20, stop=("de",)))) == ("bc", "stop", 4)


def test_held_text_comes_with_the_last_token(engine_of, alphabet):
    assert read(engine_of(alphabet()).submit(request(max_tokens=3, stop=("dx",)))) == ("bcd", "length", 3)


def test_many_requests_share_steps_and_all_come_through(engine_of, alphabet):
    step = alphabet()
    engine = engine_of(step, num_slots=3, max_queued=50)
    streams = [engine.submit(request(f"r{n}", prompt=[n % 9 + 1] * (n + 1), max_tokens=n + 1)) for n in range(20)]
    for n, stream in enumerate(streams):
        text, reason, tokens = read(stream)
        assert (len(text), reason, tokens) == (n + 1, "length", n + 1)
        assert text[0] == chr(96 + n % 9 + 2)
    assert max(len(chunks) for chunks in step.steps) == 3
    assert max(sum(len(chunk.ids) for chunk in chunks) for chunks in step.steps) <= 16
    stats = engine.stats()
    assert (stats.queued, stats.active) == (0, 0)


def test_streams_can_be_awaited_from_several_event_loops(engine_of, alphabet):
    engine = engine_of(alphabet(), max_queued=50)

    async def one(name):
        return "".join(
            [event.text async for batch in engine.submit(request(name, max_tokens=6)).batches() for event in batch]
        )

    async def many(prefix):
        return await asyncio.gather(*(one(f"{prefix}{n}") for n in range(5)))

    results = []
    threads = [threading.Thread(target=lambda p=p: results.append(asyncio.run(many(p)))) for p in "xy"]
    [thread.start() for thread in threads], [thread.join(10) for thread in threads]
    assert results == [["bcdefg"] * 5] * 2


def test_abort_frees_the_slot_for_the_next_in_the_queue(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate, num_slots=1, max_queued=1)
    first = engine.submit(request("first", max_tokens=50))
    second = engine.submit(request("second", max_tokens=2))
    with pytest.raises(RequestError) as refused:
        engine.submit(request("third"))
    assert refused.value.status == 429
    assert gate.entered.acquire(timeout=10)
    engine.abort("first")
    assert engine.stats().active == 1 and engine.stats().queued == 0
    engine.abort("first"), engine.abort("nobody")
    [gate.open.release() for _ in range(5)]
    assert read(first) == ("", "abort", 1)
    assert read(second)[0] == "bc"
    assert engine.stats().active == 0


def test_an_aborted_request_in_the_queue_never_runs(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate, num_slots=1)
    first = engine.submit(request("first", max_tokens=1))
    waiting = engine.submit(request("waiting", prompt=[9]))
    engine.abort("waiting")
    gate.open.release()
    assert (read(first)[1], read(waiting)[1]) == ("length", "abort")
    assert all(chunk.ids != (9,) for chunks in gate.inner.steps for chunk in chunks)


def test_a_failed_step_ends_its_requests_and_the_next_ones_work(engine_of, alphabet):
    step = alphabet()
    step.fail_next = 1
    engine = engine_of(step)
    assert read(engine.submit(request("a")))[1] == "error"
    assert engine.stats().active == 0 and engine.stats().healthy
    assert read(engine.submit(request("b")))[1] == "length"


def test_three_failures_in_a_row_are_unhealthy_and_one_success_heals(engine_of, alphabet):
    step = alphabet()
    step.fail_next = 3
    engine = engine_of(step)
    assert [read(engine.submit(request(str(n))))[1] for n in range(3)] == ["error"] * 3
    assert not engine.stats().healthy
    assert read(engine.submit(request("d")))[1] == "length"
    assert engine.stats().healthy


@pytest.mark.parametrize("prompt_tokens,within_s,beyond_s", [(1, 119, 121), (200, 190, 220)])
def test_a_step_that_does_not_come_back_is_unhealthy(
    engine_of, alphabet, monkeypatch, prompt_tokens, within_s, beyond_s
):
    gate, passed_s = Gate(alphabet(num_pages=16, max_seq_len=256)), [0.0]
    monkeypatch.setattr("raymill.inference.engine.time", SimpleNamespace(monotonic=lambda: passed_s[0]))
    engine = engine_of(gate, max_step_tokens=250)
    stream = engine.submit(request(prompt=[1] * prompt_tokens, max_tokens=1))
    assert gate.entered.acquire(timeout=10)
    assert engine.stats().healthy
    passed_s[0] = within_s  # a long step is no hanging one
    assert engine.stats().healthy
    passed_s[0] = beyond_s
    assert not engine.stats().healthy
    gate.open.release()  # it came back after all
    assert read(stream)[1] == "length" and becomes(lambda: engine.stats().healthy)


def test_an_idle_engine_stays_healthy(engine_of, alphabet, monkeypatch):
    passed_s = [0.0]
    monkeypatch.setattr("raymill.inference.engine.time", SimpleNamespace(monotonic=lambda: passed_s[0]))
    engine = engine_of(alphabet())
    read(engine.submit(request()))
    assert becomes(lambda: not engine.stats().active)
    passed_s[0] = 1e6
    assert engine.stats().healthy


def test_nan_logits_never_become_text(engine_of, alphabet):
    class Broken(alphabet):
        def __call__(self, chunks, table):
            return StepOutput(super().__call__(chunks, table).logits_NV * np.float32("nan"))

    assert read(engine_of(Broken()).submit(request()))[:2] == ("", "error")


@pytest.mark.parametrize(
    "wrong,field",
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [27]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 64}, "max_tokens"),
        ({"prompt": [1] * 60, "max_tokens": 5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
    ],
)
def test_a_request_outside_the_models_limits_is_refused_by_name(engine_of, alphabet, wrong, field):
    with pytest.raises(RequestError) as refused:
        engine_of(alphabet()).submit(request(**wrong))
    assert (refused.value.status, refused.value.field) == (400, field)


def test_the_whole_context_can_be_used(engine_of, alphabet):
    assert read(engine_of(alphabet()).submit(request(prompt=[1] * 60, max_tokens=4)))[2] == 4


def test_close_ends_open_streams_and_refuses_new_requests(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate, num_slots=1)
    streams = [engine.submit(request("a", max_tokens=60)), engine.submit(request("b"))]
    assert gate.entered.acquire(timeout=10)
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open.release()
    closer.join(10)
    assert [read(stream)[1] for stream in streams] == ["abort", "abort"]
    with pytest.raises(RequestError) as refused:
        engine.submit(request("c"))
    assert refused.value.status == 503


def test_stats_are_reported_while_it_works_and_end_at_zero(engine_of, alphabet):
    seen = []
    engine = engine_of(alphabet(), num_slots=2, on_stats=seen.append)
    [read(stream) for stream in [engine.submit(request(str(n), max_tokens=8)) for n in range(3)]]
    engine.close()
    assert max(stats.active for stats in seen) == 2
    assert (seen[-1].active, seen[-1].queued) == (0, 0)


def test_batches_come_at_once_at_first_then_in_intervals_then_at_once_at_the_end(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate)

    async def reader():
        loop, sizes, times = asyncio.get_running_loop(), [], []
        stream = engine.submit(request(max_tokens=6))
        gate.open.release()
        async for batch in stream.batches(every_s=0.3):
            sizes.append(len(batch))
            times.append(loop.time())
            if len(sizes) == 1:  # just behind a moment of writing, so that the next is a whole interval away
                await asyncio.sleep(0.3 - loop.time() % 0.3)
            [gate.open.release() for _ in range(3 if len(sizes) == 1 else 2)]
        return sizes, times

    sizes, times = asyncio.run(reader())
    assert sizes == [1, 3, 2]
    assert 0.25 < times[1] - times[0] < 1.0
    assert times[2] - times[1] < 0.25, "the end does not wait for the interval"


def test_the_whole_answer_can_be_awaited(engine_of, alphabet):
    engine = engine_of(alphabet())

    async def reader():
        return await engine.submit(request(max_tokens=6)).finished()

    assert "".join(event.text for event in asyncio.run(reader())) == "bcdefg"


def test_a_stream_can_be_read_without_an_event_loop(engine_of, alphabet):
    events = [event for batch in engine_of(alphabet()).submit(request(max_tokens=6)) for event in batch]
    assert "".join(event.text for event in events) == "bcdefg"


def test_a_token_that_is_no_text_ends_its_own_request_only(engine_of, alphabet, letters, monkeypatch):
    plain = letters.push

    def push(self, token):
        if token == 20:
            raise ValueError("no such letter")
        return plain(self, token)

    monkeypatch.setattr(letters, "push", push)
    gate = Gate(alphabet())
    engine = engine_of(gate)
    streams = [engine.submit(request("good", max_tokens=4)), engine.submit(request("bad", prompt=[18], max_tokens=4))]
    [gate.open.release() for _ in range(8)]
    assert [read(stream)[:2] for stream in streams] == [("bcde", "length"), ("s", "error")]
    assert engine.stats().healthy and engine.stats().active == 0
    [engine.submit(request(str(n), prompt=[19])) for n in range(3)]
    [gate.open.release() for _ in range(30)]
    assert becomes(lambda: engine.stats().active == 0)
    assert read(engine.submit(request("next", max_tokens=1)))[1] == "length" and engine.stats().healthy


def test_stats_that_cannot_be_reported_do_not_stop_completions(engine_of, alphabet):
    calls = []

    def broken(stats):
        calls.append(stats)
        raise OSError("disk full")

    engine = engine_of(alphabet(), on_stats=broken)
    assert read(engine.submit(request("a", max_tokens=5))) == ("bcdef", "length", 5)
    assert read(engine.submit(request("b")))[1] == "length" and engine.stats().healthy
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_ends_every_stream_and_is_unhealthy(engine_of, alphabet):
    class Fatal(alphabet):
        def __call__(self, chunks, table):
            raise SystemExit

    gate = Gate(Fatal())
    engine = engine_of(gate, num_slots=1)
    streams = [engine.submit(request("running", max_tokens=9)), engine.submit(request("waiting"))]
    gate.open.release()
    assert [read(stream)[1] for stream in streams] == ["error", "error"]
    stats = engine.stats()
    assert (stats.active, stats.queued, stats.healthy) == (0, 0, False)
    with pytest.raises(RequestError) as refused:
        engine.submit(request("late"))
    assert refused.value.status == 503


def test_a_reader_whose_event_loop_is_closed_does_not_stop_the_others(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate)
    left = engine.submit(request("left", max_tokens=6))
    loop = asyncio.new_event_loop()
    task = loop.create_task(left.finished())
    loop.run_until_complete(asyncio.sleep(0))
    other = engine.submit(request("other", max_tokens=6))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    [gate.open.release() for _ in range(20)]
    assert read(other)[:2] == ("bcdefg", "length")
    assert engine.stats().healthy


def test_ten_thousand_aborts_leave_no_page_held_and_no_one_waiting(engine_of, alphabet):
    engine = engine_of(alphabet(num_pages=12), num_slots=4, max_queued=40)
    streams = {}
    for n in range(10_000):
        name = f"r{n}"
        try:
            streams[name] = engine.submit(request(name, prompt=[n % 9 + 1] * (n % 40 + 1), max_tokens=20))
        except RequestError as refused:
            assert refused.status == 429
        if n % 3:
            engine.abort(f"r{n - n % 7}")
        if n % 50 == 0:
            [engine.abort(each) for each in streams]
    [engine.abort(each) for each in streams]
    assert engine.stats().active == engine.stats().queued == 0
    assert all([e for b in stream for e in b][-1].finish_reason in ("abort", "length") for stream in streams.values())
    assert engine._scheduler.pool.available == 12 and not engine._answers and not engine._by_id
    assert read(engine.submit(request("after"))) == ("bcd", "length", 3)


def test_an_id_that_is_used_again_while_its_first_request_is_in_a_step_gets_its_own_text(engine_of, alphabet):
    gate = Gate(alphabet())
    engine = engine_of(gate)
    first = engine.submit(request("same", prompt=[20]))
    assert gate.entered.acquire(timeout=10)
    engine.abort("same")
    second = engine.submit(request("same", prompt=[1]))
    [gate.open.release() for _ in range(9)]
    assert (read(first)[1], read(second)) == ("abort", ("bcd", "length", 3))


def test_logits_that_are_not_finite_end_their_own_request_only(engine_of, alphabet):
    class Broken(alphabet):
        def __call__(self, chunks, table):
            logits = super().__call__(chunks, table).logits_NV
            rows = [chunk.ids[-1] for chunk in chunks if chunk.num_logits]
            logits[[row for row, token in enumerate(rows) if token >= 20]] = np.nan
            return StepOutput(logits)

    gate = Gate(Broken())
    engine = engine_of(gate)
    streams = [engine.submit(request("good", max_tokens=4)), engine.submit(request("bad", prompt=[19], max_tokens=4))]
    [gate.open.release() for _ in range(8)]
    assert [read(stream)[:2] for stream in streams] == [("bcde", "length"), ("t", "error")]


def test_a_prompt_whose_scores_are_not_finite_ends_its_own_request_only(engine_of, alphabet):
    class Broken(alphabet):
        def __call__(self, chunks, table):
            logits = super().__call__(chunks, table).logits_NV
            logits[logits.argmax(axis=1) == 20] = np.nan
            return StepOutput(logits)

    engine = engine_of(Broken())
    asked = {"max_tokens": 2, "prompt_logprobs": 5}
    with engine._work:  # both in one step
        streams = [engine.submit(request(name, prompt=ids, **asked)) for name, ids in (("good", [1]), ("bad", [19, 3]))]
    assert [read(stream)[:2] for stream in streams] == [("bc", "length"), ("", "error")]


def test_a_prompt_can_be_scored_without_a_completion(engine_of, alphabet):
    events = next(iter(engine_of(alphabet()).submit(request(prompt=[1, 2, 9], max_tokens=0, prompt_logprobs=2))))
    assert [(event.text, event.finish_reason, event.counts, event.token) for event in events] == [
        ("", "length", False, None)
    ]
    first, second, third = events[0].prompt
    assert (first.token, first.logprob) == (1, None)
    assert second.logprob > -0.1 and second.top[0] == (2, second.logprob)
    assert third.logprob < -8 and third.top[0][0] == 3


def test_prompt_scores_come_with_the_first_token_and_each_token_with_its_own(engine_of, alphabet):
    stream = engine_of(alphabet()).submit(request(prompt=[9] * 19 + [1], max_tokens=3, prompt_logprobs=0, logprobs=1))
    events = [event for batch in stream for event in batch]
    assert [event.prompt and len(event.prompt) for event in events] == [20, None, None]
    assert [event.token.token for event in events] == [2, 3, 4]
    assert all(event.token.top[0][0] == event.token.token for event in events)


@pytest.mark.parametrize(
    "wrong,field,status",
    [
        ({"logprobs": 21}, "logprobs", 400),
        ({"prompt_logprobs": -1}, "prompt_logprobs", 400),
        ({"adapter": "other"}, "model", 404),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens", 400),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(engine_of, alphabet, wrong, field, status):
    with pytest.raises(RequestError) as refused:
        engine_of(alphabet()).submit(request(**wrong))
    assert (refused.value.field, refused.value.status) == (field, status)


def test_a_grammar_decides_and_one_that_allows_nothing_ends_its_own_request(engine_of, alphabet):
    class Only:
        """Allows one id after the other, then nothing."""

        def __init__(self, ids):
            self.left = list(ids)

        def start(self):
            return Only(self.left)

        def mask(self):
            return np.array([1 << self.left[0] if self.left else 0], np.uint32)

        def advance(self, token):
            assert token == self.left.pop(0)

    engine = engine_of(alphabet())
    good = engine.submit(request("good", max_tokens=3, grammar=Only([9, 8, 7])))
    stuck = engine.submit(request("stuck", max_tokens=3, grammar=Only([9])))
    plain = engine.submit(request("plain"))
    assert [read(stream)[:2] for stream in (good, stuck, plain)] == [
        ("ihg", "length"),
        ("i", "error"),
        ("bcd", "length"),
    ]
    assert engine.stats().healthy


class Refusing:
    """Its mask allows what `advance` then refuses: a grammar that became too complex to follow."""

    def __init__(self, allowed, says=ValueError):
        self.allowed, self.says = allowed, says

    def start(self):
        return self

    def mask(self):
        if self.allowed is None:
            raise self.says("no mask")
        return np.array([self.allowed], np.uint32)

    def advance(self, token):
        raise self.says("too complex")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "allowed,says", [(0, ValueError), (2**27 - 1, ValueError), (2**27 - 1, RuntimeError), (None, RuntimeError)]
)
def test_a_grammar_that_leads_nowhere_ends_its_own_request_and_says_nothing_of_the_engine(
    engine_of, alphabet, monkeypatch, allowed, says, compiled
):
    if not compiled:
        monkeypatch.setattr("raymill.inference.compiled_draws.functions", lambda: None)
    engine = engine_of(alphabet())
    with engine._work:  # both in one step
        plain, stuck = engine.submit(request("plain")), engine.submit(request("stuck", grammar=Refusing(allowed, says)))
    assert read(plain)[:2] == ("bcd", "length")
    last = [event for events in stuck for event in events][-1]
    assert (last.finish_reason, last.stuck) == ("error", True)
    for n in range(4):
        assert read(engine.submit(request(f"stuck{n}", grammar=Refusing(allowed, says))))[1] == "error"
    assert engine.stats().healthy


def test_a_grammar_hides_no_model_that_is_broken(engine_of, alphabet):
    class Broken(alphabet):
        def __call__(self, chunks, table):
            return StepOutput(super().__call__(chunks, table).logits_NV * np.nan)

    engine = engine_of(Broken())
    for n in range(3):
        assert read(engine.submit(request(f"r{n}", grammar=Refusing(2**27 - 1))))[1] == "error"
    assert not engine.stats().healthy


class Hidden:
    """Hidden states that say id and position."""

    num_pages, max_seq_len, vocab_size = 8, 64, 27

    def __call__(self, chunks, table):
        logits = np.eye(27, dtype=np.float32)[[3] * sum(chunk.num_logits for chunk in chunks)]
        wanted = [chunk for chunk in chunks if chunk.wants_hidden]
        rows = [(token, chunk.start + n) for chunk in wanted for n, token in enumerate(chunk.ids)]
        return StepOutput(logits, np.array(rows, np.float32) if rows else None)


def test_an_embedding_is_the_mean_hidden_state_of_length_one_and_shares_steps(engine_of):
    engine = engine_of(Hidden())
    stream = engine.submit(request(max_tokens=30))
    vector = engine.embed((2,) * 41).result(10)
    expected = np.array([2.0, 20.0]) / np.hypot(2, 20)
    assert vector.dtype == np.float32 and np.allclose(vector, expected)
    assert read(stream)[:2] == ("c" * 30, "length")
    for wrong in ((), (27,), (1,) * 65):
        with pytest.raises(RequestError):
            engine.embed(wrong)


def test_embeddings_end_with_their_step_their_future_or_the_engine(engine_of, alphabet):
    gate = Gate(Hidden())
    engine = engine_of(gate, num_slots=1)
    gone, kept, last = (engine.embed((n, n)) for n in (1, 2, 3))
    assert gate.entered.acquire(timeout=10)
    assert gone.cancel()
    gate.open.release(2)
    assert len(kept.result(10)) == 2
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open.release()
    closer.join(10)
    assert last.done()
    step = alphabet()
    step.fail_next = 1
    with pytest.raises(RequestError, match="failed on this text"):
        engine_of(step).embed((1, 2)).result(10)
