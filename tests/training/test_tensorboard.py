import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raymill.training.metrics import StepMetrics, ValidationMetrics
from raymill.training.tensorboard import TensorBoard

STEP = StepMetrics(
    step=1,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=0.5,
    tokens=128,
    tokens_per_s=640.0,
    mfu=None,
    memory_bytes=1 << 20,
    elapsed_s=0.2,
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads, by tag: step and value."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = accumulators.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def write_steps(board: TensorBoard, steps: range, loss: float) -> None:
    for step in steps:
        board.add_step(replace(STEP, step=step, loss=loss))


def test_tensorboard_reads_the_rows_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board", 0)
    board.add_step(STEP)
    board.add_step(replace(STEP, step=2, loss=math.nan, mfu=0.25, event="nan_skipped"))
    board.add_validation(ValidationMetrics(1, 2.25, None, 0.5, 0.2))
    board.close()
    read = scalars(tmp_path / "board")
    assert set(read) == {
        *(
            f"train/{name}"
            for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu", "memory_bytes")
        ),
        "validation/loss_nats",
        "validation/accuracy",
    }
    assert read["train/loss"][0] == (1, 2.5) and math.isnan(read["train/loss"][1][1])
    assert read["train/memory_bytes"] == [(1, 1 << 20), (2, 1 << 20)]
    assert read["train/mfu"] == [(2, 0.25)]
    assert read["validation/loss_nats"] == [(1, 2.25)]


def test_steps_that_are_redone_are_shown_once(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, 0)
    write_steps(first, range(1, 11), 2.0)
    first.add_validation(ValidationMetrics(4, 2.0, 1.0, 0.5, 1.0))
    first.add_validation(ValidationMetrics(8, 2.0, 1.0, 0.5, 2.0))
    again = TensorBoard(tmp_path, 6)
    write_steps(again, range(7, 9), 1.0)
    assert scalars(tmp_path)["train/loss"] == [*((step, 2.0) for step in range(1, 7)), (7, 1.0), (8, 1.0)]
    assert scalars(tmp_path)["validation/accuracy"] == [(4, 0.5)]
    first.close()
    again.close()


_KILLED = """
import os, signal, sys
from pathlib import Path
from raymill.training.metrics import StepMetrics
from raymill.training.tensorboard import TensorBoard
board = TensorBoard(Path(sys.argv[1]), 0)
for step in range(1, 31):
    board.add_step(StepMetrics(step, 2.0, 1e-3, 0.5, step, 1.0, None, 1, 1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_step(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(1, 31))
