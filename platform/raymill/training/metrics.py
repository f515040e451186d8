"""What a training run tells of its steps: one line of JSON each, appended as it goes, cut back when steps are redone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raymill.artifact import write_atomic

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """What one step was like. `loss` is in nats per token, the mean over the learned targets of all workers.

    0 for a step that had none. `tokens` counts positions, empty ones included.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    elapsed_s: float
    validation: dict[str, float | None] | None = None


def append_metrics(path: Path, metrics: StepMetrics) -> None:
    """One JSON line per step; `validation` only where there was one."""
    row = {name: value for name, value in asdict(metrics).items() if value is not None}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last complete line of a metrics file that may still be written to; reads only the file's end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line break is a line being written
    except FileNotFoundError:
        return None
    row: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return row


def truncate_metrics(path: Path, step: int) -> float:
    """Forgets the steps that will be redone; returns the seconds spent on those kept."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return float(rows[-1]["elapsed_s"]) if rows else 0.0
