"""What happens when a step goes wrong: the verdict on its loss, the line in events.jsonl, the batches left out since.

In: each step's loss and gradient norm, before the weights change. Out: go, skip (weights and optimizer state stay as
they are, the next batch is taken), roll_back (to the newest checkpoint, never to see this batch again) or stop.

Everything is a function of metrics.jsonl and events.jsonl, so a run that was killed decides as the undisturbed one
does, and loss and norm are the same bits on every worker, so all of them decide alike. Steps that are redone write
their events again: `truncate_events` forgets those, but keeps what was rolled back, since left-out batches stay out.
Costs: a mean and a deviation over the window, 10 us per step at 50; places are looked up when something went wrong.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from raymill.artifact import write_atomic
from raymill.dataset.shards import Place
from raymill.errors import DataError
from raymill.training.config import GuardConfig
from raymill.training.metrics import read_rows

EVENTS = "events.jsonl"

Action = Literal["skip", "roll_back", "stop"]
Kind = Literal["nan", "spike"]
Event = Mapping[str, Any]
"""A row of events.jsonl: step, batch, kind, action, loss, gradient_norm (null where no number), sequences."""


class Guard:
    """The verdicts of one run. `losses` are those of the accepted steps so far, `num_events` the events written so far."""

    def __init__(self, config: GuardConfig, losses: Sequence[float] = (), num_events: int = 0) -> None:
        self._config = config
        self._window = deque(losses, maxlen=config.spike_window)
        self._num_events = num_events

    @classmethod
    def resume(cls, config: GuardConfig, metrics: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> Guard:
        """As it stood after the steps of metrics.jsonl; both files are truncated to the step that the run goes on from."""
        rows = [row for row in metrics if "event" not in row]
        return cls(config, [row["loss"] for row in rows[-config.spike_window :]], len(events))

    def verdict(self, loss: float, gradient_norm: float) -> tuple[Kind, Action] | None:
        """What went wrong with a step and what is to be done; None: go on. To be asked once per step."""
        kind = self._kind(loss, gradient_norm)
        if kind is None:
            self._window.append(loss)
            return None
        action: Action | None = self._config.on_nan if kind == "nan" else self._config.on_spike
        assert action is not None
        if self._num_events >= self._config.max_events:
            action = "stop"
        self._num_events += 1
        return kind, action

    def _kind(self, loss: float, gradient_norm: float) -> Kind | None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return "nan"
        if self._config.on_spike is None or len(self._window) < self._config.spike_window:
            return None
        # fsum is exact: the window's history, one value at a time or read from a file, cannot change the verdict.
        mean = math.fsum(self._window) / len(self._window)
        variance = math.fsum((each - mean) ** 2 for each in self._window) / len(self._window)
        return "spike" if loss > mean + self._config.spike_deviations * math.sqrt(variance) else None


def make_event(
    step: int, batch: int, found: tuple[Kind, Action], loss: float, gradient_norm: float, places: Iterable[Place]
) -> Event:
    """The row of a step that went wrong. `batch` is the number that the loader was asked for."""
    figures = {"loss": loss, "gradient_norm": gradient_norm}
    return {
        "step": step,
        "batch": batch,
        "kind": found[0],
        "action": found[1],
        **{name: value if math.isfinite(value) else None for name, value in figures.items()},
        "sequences": [asdict(place) for place in places],
    }


def append_event(path: Path, event: Event) -> None:
    """Adds a line, in one write, before anything is done about it."""
    with path.open("ab") as file:
        file.write(json.dumps(event, allow_nan=False).encode() + b"\n")


def read_events(path: Path) -> list[Event]:
    """The events of a run; none where there is no file."""
    return list(read_rows(path))


def truncate_events(path: Path, step: int) -> None:
    """Forgets what was found after `step`, for it will be found again, except what was rolled back."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step or row["action"] == "roll_back"]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def left_out(events: Iterable[Event]) -> frozenset[int]:
    """The batches that are not trained on, because a step with them was rolled back."""
    return frozenset(event["batch"] for event in events if event["action"] == "roll_back")


def batch_number(step: int, left_out: Collection[int]) -> int:
    """The batch of step `step`, both from 0: the step-th of those that are not left out."""
    number = step
    for out in sorted(left_out):
        number += out <= number
    return number


def stop_error(event: Event, config: GuardConfig, num_events: int) -> DataError:
    """The end of the run, with where the step's sequences stand. `num_events`: those in events.jsonl, this one included."""
    loss, norm = event["loss"], event["gradient_norm"]
    what = "is not finite" if event["kind"] == "nan" else f"of {loss:.4g} is a spike"
    rows = [f"{place['shard']} row {place['token']}" for place in event["sequences"]]
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    why = f"loss {loss}, gradient norm {norm}; its sequences: {', '.join(rows[:4])}{more} (all in {EVENTS})"
    fix = "lower train.optimizer.learning_rate, mend those rows, or set train.guard.on_"
    fix += f"{event['kind']} to skip or roll_back"
    if num_events > config.max_events:
        why += f"; {num_events - 1} steps were skipped or rolled back before, train.guard.max_events allows no more"
        fix = "lower train.optimizer.learning_rate or mend those rows, or raise train.guard.max_events"
    return DataError(f"the loss of step {event['step']} {what}", why=why, fix=fix)
