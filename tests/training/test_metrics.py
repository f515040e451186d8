import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from raymill.errors import ArtifactError
from raymill.training.metrics import (
    METRICS,
    VALIDATION,
    StepMetrics,
    ValidationMetrics,
    append_metrics,
    last_metrics,
    read_rows,
    truncate_metrics,
)

STEP = StepMetrics(
    step=1,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=0.7,
    tokens=128,
    tokens_per_s=640.0,
    mfu=0.25,
    memory_bytes=1 << 20,
    elapsed_s=0.2,
)


def write_run(folder: Path, steps: int, validated: tuple[int, ...] = ()) -> None:
    for step in range(1, steps + 1):
        append_metrics(folder / METRICS, replace(STEP, step=step, tokens=128 * step, elapsed_s=0.2 * step))
    for step in validated:
        append_metrics(folder / VALIDATION, ValidationMetrics(step, 2.0, 1.1, 0.5, 0.2 * step))


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_a_row_says_every_figure_of_its_step(tmp_path: Path) -> None:
    append_metrics(tmp_path / METRICS, STEP)
    append_metrics(tmp_path / METRICS, replace(STEP, step=2, mfu=None, event="nan_skipped"))
    first, second = read_rows(tmp_path / METRICS)
    assert first == {
        "step": 1,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.7,
        "tokens": 128,
        "tokens_per_s": 640.0,
        "mfu": 0.25,
        "memory_bytes": 1 << 20,
        "elapsed_s": 0.2,
    }
    assert second["mfu"] is None and second["event"] == "nan_skipped"


def test_a_figure_that_is_no_number_leaves_the_file_plain_json(tmp_path: Path) -> None:
    append_metrics(tmp_path / METRICS, replace(STEP, loss=math.nan, gradient_norm=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["gradient_norm"] is None


def test_steps_that_will_be_redone_are_forgotten_in_both_files(tmp_path: Path) -> None:
    write_run(tmp_path, 10, validated=(3, 6, 9))
    before = (tmp_path / METRICS).read_bytes()
    truncate_metrics(tmp_path, 7)
    assert steps_of(tmp_path / METRICS) == list(range(1, 8))
    assert steps_of(tmp_path / VALIDATION) == [3, 6]
    assert before.startswith((tmp_path / METRICS).read_bytes())


def test_a_run_that_begins_anew_keeps_nothing(tmp_path: Path) -> None:
    truncate_metrics(tmp_path, 0)
    write_run(tmp_path, 2, validated=(1,))
    truncate_metrics(tmp_path, 0)
    assert steps_of(tmp_path / METRICS) == steps_of(tmp_path / VALIDATION) == []


def test_a_line_torn_by_a_kill_is_passed_over_and_then_removed(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    whole = (tmp_path / METRICS).read_bytes()
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 4, "lo')
    last = last_metrics(tmp_path / METRICS)
    assert last is not None and last["step"] == 3
    assert steps_of(tmp_path / METRICS) == [1, 2, 3]
    truncate_metrics(tmp_path, 3)
    assert (tmp_path / METRICS).read_bytes() == whole
    append_metrics(tmp_path / METRICS, replace(STEP, step=4))
    assert steps_of(tmp_path / METRICS) == [1, 2, 3, 4]


def test_the_last_row_of_a_long_file_is_found_at_its_end(tmp_path: Path) -> None:
    assert last_metrics(tmp_path / METRICS) is None
    write_run(tmp_path, 100)
    with (tmp_path / METRICS).open("r+b") as file:
        file.write(b"not read")
    last = last_metrics(tmp_path / METRICS)
    assert last is not None and last["step"] == 100


def test_a_damaged_line_is_told_with_its_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"st\x00p": 2\n{"step": 3}\n')
    with pytest.raises(ArtifactError, match="is damaged") as error:
        read_rows(path)
    assert "line 2" in str(error.value)
