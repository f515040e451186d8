"""What a training run tells of itself: a line of JSON per step and per validation, cut back when steps are redone.

    metrics.jsonl      a StepMetrics per step, written as the step ends
    validation.jsonl   a ValidationMetrics per validation, written later than its step: validation runs beside training

Steps rise in both files. A kill leaves at most one torn line at the end, which every reader passes over and
`truncate_metrics` removes. A figure that is no number (the loss of a step that went wrong) is null in the file. A line
costs 25 us.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raymill.errors import ArtifactError

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
_TAIL_BYTES = 4096
"""More than the longest line."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step was like, over all workers."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Nats per token, the mean over the step's learned targets; 0 for a step that had none."""
    learning_rate: float
    """The rate this step was taken with."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    tokens: int
    """Positions of this step and all before it, empty ones included."""
    tokens_per_s: float
    """Positions of this step over its seconds."""
    mfu: float | None
    """Share of the machine's peak that the model's arithmetic came to (training/flops.py); None where it is unknown."""
    memory_bytes: int
    """Rank 0's: resident memory at the end of the step, or on a GPU the most that was allocated until then."""
    elapsed_s: float
    """Seconds of training up to the end of this step, those before a restart included."""
    event: str | None = None
    """What the guards made of the step, such as nan_skipped; None for a step like any other."""


@dataclass(frozen=True)
class ValidationMetrics:
    """What the model of one step scored on the val split."""

    step: int
    """The step whose weights were scored."""
    loss_nats: float
    """Nats per token."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of text; None where only some of the text is predicted."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    elapsed_s: float
    """Seconds of training up to the end of its step, as in StepMetrics."""


def append_metrics(path: Path, metrics: StepMetrics | ValidationMetrics) -> None:
    """Adds one line, in one write. `event` is left out where there was none."""
    row = {name: _json_number(value) for name, value in asdict(metrics).items()}
    if row.get("event", "") is None:
        del row["event"]
    with path.open("ab") as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file that may still be written to; none where there is no file."""
    return [row for row, _ in _rows(path)]


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of such a file; reads only the file's end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line break is a line being written
    except FileNotFoundError:
        return None
    row: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return row


def truncate_metrics(folder: Path, step: int) -> None:
    """Forgets in both files of `folder` the steps after `step`, which will be redone."""
    for path in (folder / VALIDATION, folder / METRICS):
        kept_bytes = 0
        for row, end in _rows(path):
            if row["step"] > step:
                break
            kept_bytes = end
        if path.exists():
            os.truncate(path, kept_bytes)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line and where it ends, bytes from the start of the file."""
    end = 0
    lines = (path.read_bytes() if path.exists() else b"").split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        end += len(line) + 1
        try:
            row = json.loads(line)
        except ValueError:
            fix = "mend the line, or delete the folder it lies in and train again"
            raise ArtifactError(f"{path} is damaged", where=f"line {number}", why="it is no JSON", fix=fix) from None
        yield row, end


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
