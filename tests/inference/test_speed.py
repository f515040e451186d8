from itertools import groupby

import numpy as np
import pytest

from raymill.inference.speed import decode_speeds
from raymill.inference.step import StepOutput


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only steps move: the machine the tests run on may be slow."""
    monkeypatch.setattr("raymill.inference.speed.time.perf_counter", lambda: Sleeper.now_s)


class Sleeper:
    """A step that takes `pause_s`; in the bursts named in `stutters` (0 is the first) ten times that."""

    num_pages, max_seq_len, vocab_size = 8, 32, 10
    now_s = 0.0

    def __init__(self, name, calls, pause_s, stutters=()):
        self.name, self.calls, self.pause_s, self.stutters = name, calls, pause_s, stutters
        self.bursts, self.last = -1, None

    def __call__(self, chunks, table):
        now = (len(chunks), chunks[0].start)
        if self.last is None or now[0] != self.last[0] or now[1] <= self.last[1]:
            self.bursts += 1
        self.last = now
        self.calls.append((self.name, len(chunks)))
        Sleeper.now_s += self.pause_s * (10 if self.bursts in self.stutters else 1)
        return StepOutput(np.zeros((len(chunks), 10), np.float32))


def test_models_take_turns_burst_by_burst():
    calls = []
    decode_speeds({"before": Sleeper("before", calls, 0.001), "after": Sleeper("after", calls, 0.001)}, [1, 8])
    for count in (1, 8):
        turns = [name for name, _ in groupby(name for name, size in calls if size == count)]
        assert len(turns) >= 10 and turns == ["before", "after"] * (len(turns) // 2)


def test_a_machine_that_stutters_does_not_change_the_ratio():
    calls = []
    steps = {"before": Sleeper("before", calls, 0.001, stutters=(0, 2, 5)), "after": Sleeper("after", calls, 0.001)}
    speeds = decode_speeds(steps, [1])
    assert speeds["after", 1] / speeds["before", 1] == pytest.approx(1, rel=1e-6)


def test_tokens_of_all_sequences_count():
    speeds = decode_speeds({"only": Sleeper("only", [], 0.001)}, [1, 8])
    assert speeds["only", 1] == pytest.approx(1000)
    assert speeds["only", 8] == pytest.approx(8000)
