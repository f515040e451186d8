"""Hand-computed points of each schedule."""

from typing import Any

import pytest

from raymill.training.config import ScheduleConfig
from raymill.training.schedule import learning_rate_scale


def scales(total_steps: int, **settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate_scale(step, total_steps, config) for step in range(total_steps)]


def test_warmup_rises_linearly_and_reaches_the_peak_with_its_last_step() -> None:
    for name in ("cosine", "linear", "step", "wsd"):
        assert scales(100, name=name, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_begins_at_the_peak() -> None:
    assert scales(10, name="cosine", warmup_steps=0)[0] == 1.0


def test_cosine_is_half_way_in_the_middle() -> None:
    found = scales(20, name="cosine", warmup_steps=0, final_fraction=0.2)
    assert found[5] == pytest.approx(0.2 + 0.8 * (0.5 + 0.5 * 2**-0.5))
    assert found[10] == pytest.approx(0.6)
    assert found[15] == pytest.approx(0.2 + 0.8 * (0.5 - 0.5 * 2**-0.5))


def test_linear_falls_in_equal_steps() -> None:
    assert scales(6, name="linear", warmup_steps=2, final_fraction=0.2) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4])


def test_step_multiplies_at_each_milestone() -> None:
    found = scales(8, name="step", warmup_steps=0, milestones=(0.5, 0.75), factor=0.1)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_wsd_is_constant_and_then_falls_linearly() -> None:
    found = scales(10, name="wsd", warmup_steps=2, decay_fraction=0.4, final_fraction=0.0)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_fraction_is_what_a_step_after_the_last_would_have(name: str) -> None:
    settings = {"name": name, "warmup_steps": 3, "decay_fraction": 0.2}
    for final_fraction in (0.0, 0.5):
        config = ScheduleConfig(**settings, final_fraction=final_fraction)
        assert learning_rate_scale(20, 20, config) == pytest.approx(final_fraction)
        assert learning_rate_scale(19, 20, config) > final_fraction


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert scales(3, name="cosine", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


def test_a_run_of_one_step_has_the_peak() -> None:
    for name in ("cosine", "linear", "step", "wsd"):
        assert scales(1, name=name, warmup_steps=0) == [1.0]


def test_it_stays_between_zero_and_one() -> None:
    for name in ("cosine", "linear", "step", "wsd"):
        for total_steps in (1, 2, 7, 50):
            assert all(0 <= each <= 1 for each in scales(total_steps, name=name, warmup_steps=5, final_fraction=0.0))
