"""Jobs run in order beside the loop, and what goes wrong in one is told in the loop."""

import threading
import time
from functools import partial

import pytest

from raymill.training.background import Background


def test_jobs_run_in_order_on_another_thread() -> None:
    here, done = threading.current_thread(), []

    def job(number: int) -> None:
        time.sleep(0.01 * (5 - number))
        done.append((number, threading.current_thread() is here))

    with Background() as background:
        for number in range(5):
            background.submit(f"kind {number}", partial(job, number))
    assert done == [(number, False) for number in range(5)]


def test_one_of_a_kind_may_wait_and_the_next_blocks() -> None:
    begun, gate, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        gate.wait(10)

    with Background() as background:
        background.submit("save", first)
        assert begun.wait(10)
        background.submit("save", lambda: done.append("second"))
        background.submit("validate", lambda: done.append("other kind"))
        threading.Timer(0.2, gate.set).start()
        started = time.monotonic()
        background.submit("save", lambda: done.append("third"))
        assert time.monotonic() - started > 0.1
    assert done == ["second", "other kind", "third"]


def test_an_error_is_raised_at_the_next_submit_and_nothing_later_runs() -> None:
    done: list[str] = []
    background = Background()
    gate = threading.Event()

    def fail() -> None:
        gate.wait(10)
        raise ValueError("disk")

    background.submit("validate", fail)
    background.submit("save", lambda: done.append("after"))
    gate.set()
    with pytest.raises(ValueError, match="disk"):
        background.finish()
    with pytest.raises(ValueError, match="disk"):
        background.submit("save", lambda: done.append("later"))
    assert done == []


def test_what_a_job_used_is_given_back_when_it_is_over_or_never_runs() -> None:
    given: list[str] = []
    gate = threading.Event()
    background = Background()

    def fail() -> None:
        gate.wait(10)
        raise ValueError("disk")

    background.submit("save", lambda: None, after=lambda: given.append("done"))
    background.submit("validate", fail, after=lambda: given.append("failed"))
    background.submit("save", lambda: given.append("never"), after=lambda: given.append("dropped"))
    gate.set()
    with pytest.raises(ValueError, match="disk"):
        background.finish()
    with pytest.raises(ValueError, match="disk"):
        background.submit("save", lambda: given.append("never"), after=lambda: given.append("refused"))
    assert given == ["done", "failed", "dropped", "refused"]


def test_finish_waits_for_all() -> None:
    done: list[int] = []
    background = Background()
    background.submit("a", lambda: time.sleep(0.2))
    background.submit("b", lambda: done.append(1))
    background.finish()
    assert done == [1]
    background.finish()


def test_a_loop_that_fails_still_gets_its_work_done_and_its_own_error() -> None:
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise ValueError("validation")

    with pytest.raises(KeyError) as error, Background() as background:
        background.submit("a", fail)
        raise KeyError("loop")
    assert done == [1]
    assert error.value.__notes__ == ["beside it, work in the background failed: validation"]
