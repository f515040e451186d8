"""Progress is silent for short work, one live line on a terminal, plain lines elsewhere."""

import io

import pytest

from raymill.telemetry import progress
from raymill.telemetry.progress import Progress, duration


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def show(clock: Clock, terminal: bool, seconds: int) -> str:
    """What 100 tokens a second of 10,000 look like after some seconds."""
    stream = Stream(terminal)
    shown = Progress("[3/8] train", stream)
    for second in range(seconds):
        clock.now += 1
        shown.update(100 * (second + 1), 10_000, "tokens", "loss 2.5")
    return stream.getvalue()


def test_short_work_is_silent(clock: Clock) -> None:
    assert show(clock, True, 4) == show(clock, False, 4) == ""


def test_a_terminal_has_one_line_with_rate_and_eta(clock: Clock) -> None:
    text = show(clock, True, 20)
    assert "\n" not in text
    assert text.split("\r\x1b[K")[-1] == "[3/8] train: 2,000/10,000 tokens  100 tokens/s  ETA 1 min 20 s  loss 2.5"


def test_elsewhere_there_is_a_line_every_half_minute(clock: Clock) -> None:
    lines = show(clock, False, 65).splitlines()
    assert [line.split()[2] for line in lines] == ["3,000/10,000", "6,000/10,000"]
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_work_that_goes_back_to_a_checkpoint_has_no_negative_rate(clock: Clock) -> None:
    stream = Stream(True)
    shown = Progress("train", stream)
    for done in (100, 900, 200, 300):
        clock.now += 10
        shown.update(done, 1000, "tokens")
    assert "-" not in stream.getvalue() and "10 tokens/s" in stream.getvalue().split("\r\x1b[K")[-1]


def test_a_wait_says_what_for_and_since_when(clock: Clock) -> None:
    stream = Stream(True)
    shown = Progress("train", stream)
    clock.now += 7
    shown.waiting("workers start")
    shown.note("checkpoint step-2 is passed over")
    assert stream.getvalue() == "\r\x1b[Ktrain: workers start  7 s\r\x1b[Ktrain: checkpoint step-2 is passed over\n"


@pytest.mark.parametrize(("seconds", "text"), [(41.7, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text
