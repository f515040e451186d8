import pytest

from raymill.training.config import ScheduleConfig
from raymill.training.schedule import learning_rate_at


def test_it_rises_to_the_peak_and_falls_to_the_final_fraction() -> None:
    config = ScheduleConfig(warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate_at(step, 100, 2.0, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_of_one_step_without_warmup_has_the_peak() -> None:
    assert learning_rate_at(0, 1, 0.5, ScheduleConfig(warmup_steps=0)) == 0.5
