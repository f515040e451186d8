"""A worker that hangs says where and ends; so does one that was stopped, and those that waited for it."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raymill.training.watchdog import HUNG, STACKS, Watchdog


def test_a_hang_writes_every_stack_and_ends_the_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        over.set()

    with caplog.at_level(logging.ERROR), Watchdog(tmp_path, 3, 0.4, on_hang=end) as watchdog:
        watchdog.beat(17)
        wait_in_vain(over)
    assert ended == [HUNG]
    stacks = (tmp_path / STACKS / "rank-3.txt").read_text()
    assert "rank 3 has not finished a step after step 17 in time (0.4 s a step)" in stacks
    assert "in wait_in_vain" in stacks
    (record,) = caplog.records
    assert "rank 3" in record.message and "step 17" in record.message and "rank-3.txt" in record.message


def wait_in_vain(over: threading.Event) -> None:
    assert over.wait(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_cannot_say_so_ends_all_the_same(tmp_path: Path) -> None:
    def full(line: str) -> None:
        raise OSError("No space left on device")

    ended: list[int] = []
    with Watchdog(tmp_path, 0, 0.2, tell=full, on_hang=ended.append) as watchdog:
        watchdog.beat(1)
        _until(lambda: bool(ended), 10)
    assert ended == [HUNG]


def test_beats_keep_it_quiet_and_nothing_is_left(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, 1.5, on_hang=ended.append) as watchdog:
        for step in range(20):
            watchdog.beat(step)
            time.sleep(0.12)
    assert not ended and not (tmp_path / STACKS).exists()


def test_after_the_last_step_it_is_quiet(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, 0.4, on_hang=ended.append) as watchdog:
        watchdog.beat(1)
        watchdog.stop()
        time.sleep(0.8)
    assert not ended


def test_the_first_step_may_take_longer(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, 0.4, on_hang=ended.append):
        time.sleep(1.0)
        assert not ended
        _until(lambda: bool(ended), 10)
    assert "its first step" in (tmp_path / STACKS / "rank-0.txt").read_text()


def test_native_code_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_keep_the_lock, args=(tmp_path,))
    worker.start()
    worker.join(40)
    assert worker.exitcode == 1
    assert "in _keep_the_lock" in (tmp_path / STACKS / "rank-0.txt").read_text()


def _keep_the_lock(folder: Path) -> None:
    import ctypes

    with Watchdog(folder, 0, 0.5) as watchdog:
        watchdog.beat(1)
        time.sleep(0.3)
        ctypes.PyDLL(None).sleep(30)  # PyDLL does not let go of the lock


def test_all_end_when_one_is_stopped_and_it_too_when_it_runs_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    steps = [context.Value("i", -1) for _ in range(2)]
    workers = [context.Process(target=_train, args=(rank, tmp_path, steps[rank])) for rank in range(2)]
    for worker in workers:
        worker.start()
    _until(lambda: steps[0].value > 5, 60)
    os.kill(workers[1].pid or 0, signal.SIGSTOP)
    workers[0].join(30)
    assert workers[0].exitcode == HUNG
    stacks = (tmp_path / STACKS / "rank-0.txt").read_text()
    assert "all_reduce" in stacks and "in _train" in stacks
    assert workers[1].exitcode is None
    os.kill(workers[1].pid or 0, signal.SIGCONT)
    workers[1].join(30)
    assert workers[1].exitcode not in (None, 0)


def _train(rank: int, folder: Path, done: "multiprocessing.sharedctypes.Synchronized[int]") -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with Watchdog(folder, rank, 2.0) as watchdog:
        for step in range(10_000):
            dist.all_reduce(torch.ones(1))
            watchdog.beat(step)
            done.value = step
            time.sleep(0.01)


def _until(true: Callable[[], bool], timeout_s: float) -> None:
    limit_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < limit_s
        time.sleep(0.01)
