"""Verdicts by hand, and that a kill changes none: the small run at the end is the loop's protocol with files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from raymill.dataset.shards import Place
from raymill.training.config import GuardConfig
from raymill.training.guard import (
    EVENTS,
    Guard,
    append_event,
    batch_number,
    left_out,
    make_event,
    read_events,
    stop_error,
    truncate_events,
)

NAN, INF = float("nan"), float("inf")
SPIKES = GuardConfig(on_spike="skip", spike_window=4, spike_deviations=3.0)
PLACE = Place(sequence=7, shard="train-00001.bin", token=640, tokens=64, document=3)


def test_a_finite_loss_goes_on() -> None:
    assert Guard(GuardConfig()).verdict(3.0, 1.0) is None


@pytest.mark.parametrize(("loss", "norm"), ((NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF)))
def test_a_loss_or_norm_that_is_no_number_gets_the_configured_action(loss: float, norm: float) -> None:
    assert Guard(GuardConfig(on_nan="roll_back")).verdict(loss, norm) == ("nan", "roll_back")


def test_a_spike_is_that_many_deviations_above_the_window() -> None:
    # mean 2, deviation 1: the border is at 5
    window = [1.0, 3.0, 1.0, 3.0]
    assert Guard(SPIKES, window).verdict(5.0, 1.0) is None
    assert Guard(SPIKES, window).verdict(math.nextafter(5.0, 6), 1.0) == ("spike", "skip")
    assert Guard(SPIKES, window).verdict(-100.0, 1.0) is None


def test_no_spike_before_the_window_is_full_nor_when_none_is_looked_for() -> None:
    assert Guard(SPIKES, [1.0, 3.0, 1.0]).verdict(100.0, 1.0) is None
    assert Guard(GuardConfig(spike_window=4), [1.0, 3.0, 1.0, 3.0]).verdict(100.0, 1.0) is None


def test_the_window_moves_with_accepted_losses_only() -> None:
    guard = Guard(SPIKES, [1.0, 3.0, 1.0, 3.0])
    assert guard.verdict(100.0, 1.0) == ("spike", "skip")
    assert guard.verdict(100.0, 1.0) == ("spike", "skip")
    assert guard.verdict(4.9, 1.0) is None  # window 3, 1, 3, 4.9: mean 2.975, deviation 1.38
    assert guard.verdict(7.0, 1.0) is None
    assert Guard(SPIKES, [1.0, 3.0, 1.0, 3.0]).verdict(7.0, 1.0) == ("spike", "skip")


def test_a_resumed_window_holds_accepted_losses_only() -> None:
    rows = [{"loss": 1.0}, {"loss": 3.0}, {"loss": 100.0, "event": "spike_skipped"}, {"loss": 1.0}]
    rows += [{"loss": None, "event": "nan_skipped"}, {"loss": 3.0}]
    assert Guard.resume(SPIKES, rows, []).verdict(5.0, 1.0) is None
    assert Guard.resume(SPIKES, rows, []).verdict(5.1, 1.0) == ("spike", "skip")


def test_more_events_than_allowed_stop_the_run() -> None:
    guard = Guard(GuardConfig(on_nan="skip", max_events=2))
    assert [guard.verdict(NAN, 1.0) for _ in range(3)] == [("nan", "skip"), ("nan", "skip"), ("nan", "stop")]
    assert Guard(GuardConfig(on_nan="skip", max_events=2), num_events=2).verdict(NAN, 1.0) == ("nan", "stop")


def test_the_message_names_shard_and_row_and_what_to_do() -> None:
    config = GuardConfig()
    event = make_event(12, 12, ("nan", "stop"), NAN, 3.0, [PLACE])
    text = str(stop_error(event, config, 1))
    assert "step 12 is not finite" in text and "train-00001.bin row 640" in text
    assert "train.optimizer.learning_rate" in text and "train.guard.on_nan" in text


def test_the_message_of_too_many_says_so() -> None:
    config = GuardConfig(on_spike="skip", max_events=2)
    event = make_event(12, 12, ("spike", "stop"), 9.0, 3.0, [PLACE] * 6)
    text = str(stop_error(event, config, 3))
    assert "of 9 is a spike" in text and "train.guard.max_events" in text and "and 2 more" in text


def test_an_event_is_valid_json_with_the_places(tmp_path: Path) -> None:
    append_event(tmp_path / EVENTS, make_event(4, 5, ("nan", "skip"), NAN, INF, [PLACE]))
    (row,) = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    place = {"sequence": 7, "shard": "train-00001.bin", "token": 640, "tokens": 64, "document": 3}
    assert row == {"step": 4, "batch": 5, "kind": "nan", "action": "skip", "loss": None, "gradient_norm": None} | {
        "sequences": [place]
    }
    assert read_events(tmp_path / EVENTS) == [row]


def test_no_file_is_no_event(tmp_path: Path) -> None:
    assert read_events(tmp_path / EVENTS) == []
    truncate_events(tmp_path / EVENTS, 3)
    assert not (tmp_path / EVENTS).exists()


def test_steps_that_are_redone_write_their_events_again_but_what_was_rolled_back_stays(tmp_path: Path) -> None:
    for step, action in ((2, "skip"), (5, "skip"), (6, "roll_back"), (7, "stop")):
        append_event(tmp_path / EVENTS, {"step": step, "batch": step, "action": action})
    truncate_events(tmp_path / EVENTS, 4)
    assert [row["step"] for row in read_events(tmp_path / EVENTS)] == [2, 6]


def test_steps_pass_over_the_batches_left_out() -> None:
    out = left_out(
        [{"batch": 3, "action": "roll_back"}, {"batch": 2, "action": "roll_back"}, {"batch": 0, "action": "skip"}]
    )
    assert out == {2, 3}
    assert [batch_number(step, out) for step in range(5)] == [0, 1, 4, 5, 6]
    assert [batch_number(step, frozenset()) for step in range(3)] == [0, 1, 2]


def losses_of(batch: int) -> float:
    """A run with a spike at batch 11, a batch that is no number at 17, and noise."""
    return {11: 50.0, 17: NAN}.get(batch, 3.0 - 0.05 * batch + 0.1 * math.sin(7 * batch))


def drive(folder: Path, config: GuardConfig, steps: int, kills: Sequence[int]) -> list[int]:
    """Checkpoints every 4 steps; `kills` are steps before whose end the process dies. Returns the batches learned from."""
    kills, metrics, learned = list(kills), list[dict[str, float | str]](), list[int]()
    step, saved = 0, 0
    guard = Guard.resume(config, metrics, read_events(folder))
    while step < steps:
        number = batch_number(step, left_out(read_events(folder)))
        loss = losses_of(number)
        found = guard.verdict(loss, 1.0)
        step += 1
        if found is not None:
            append_event(folder, make_event(step, number, found, loss, 1.0, []))
        restart = found is not None and found[1] == "roll_back"
        if step in kills:
            kills.remove(step)
            restart = True
        if restart:
            step = saved
            truncate_events(folder, saved)
            metrics = [row for row in metrics if float(row["step"]) <= saved]
            learned = learned[: sum("event" not in row for row in metrics)]
            guard = Guard.resume(config, metrics, read_events(folder))
            continue
        metrics.append({"step": step, "loss": loss} | ({} if found is None else {"event": "spike_skipped"}))
        learned += [number] if found is None else []
        saved = step if step % 4 == 0 else saved
    return learned


@pytest.mark.parametrize("kills", ([], [1], [12], [13, 13], [2, 9, 14, 18, 18, 19]))
def test_a_killed_run_skips_the_same_steps_and_learns_from_the_same_batches(tmp_path: Path, kills: list[int]) -> None:
    config = GuardConfig(on_nan="roll_back", on_spike="skip", spike_window=6, spike_deviations=4.0)
    learned = drive(tmp_path / EVENTS, config, 24, kills)
    assert learned == [number for number in range(25) if number not in (11, 17)]
    found = {(event["batch"], event["kind"], event["action"]) for event in read_events(tmp_path / EVENTS)}
    assert found == {(11, "spike", "skip"), (17, "nan", "roll_back")}
    assert len(read_events(tmp_path / EVENTS)) == 2


def test_a_run_rebuilt_at_any_step_gives_the_verdicts_of_the_one_that_went_on() -> None:
    config = GuardConfig(on_nan="skip", on_spike="skip", spike_window=5, spike_deviations=4.0, max_events=100)
    losses = [2 + 0.3 * math.sin(3.7 * step * step) + (1.1 if step % 13 == 12 else 0) for step in range(60)]
    guard, metrics, verdicts, events = Guard(config), list[dict[str, float | str]](), [], 0
    for loss in losses:
        again = Guard.resume(config, metrics, [{}] * events)
        found = guard.verdict(loss, 1.0)
        assert again.verdict(loss, 1.0) == found
        verdicts.append(found)
        events += found is not None
        metrics.append({"loss": loss} | ({} if found is None else {"event": "spike_skipped"}))
    assert 0 < sum(found is not None for found in verdicts) < 20
