"""The table of training: sides that stay take turns, rows are comparable or say so, and the GPU's script runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks.measure import Side
from benchmarks.training import gpu
from benchmarks.training.bench import SIDES, Bench
from benchmarks.training.overhead import overhead
from benchmarks.training.steps import _sizes
from benchmarks.turns import Talk, play

SIDE = """
import json, sys, time
print(json.dumps({"name": sys.argv[1], "peak": 0}), flush=True)
for number, line in enumerate(sys.stdin):
    if sys.argv[1] == "breaks" and number == 1:
        raise ValueError("no more")
    if sys.argv[1] == "sleeps":
        time.sleep(60)
    print(json.dumps({"number": number}), flush=True)
print(json.dumps({"peak": 7}), flush=True)
"""


@pytest.fixture
def side(tmp_path: Path) -> Path:
    path = tmp_path / "side.py"
    path.write_text(SIDE)
    return path


def test_sides_that_stay_take_turns(side: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = Path(sys.executable)
    talks = play([Side(name, side, python, [name]) for name in ("a", "breaks", "b")], 3, lambda turn: turn["number"])
    said = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if "round" in line]
    assert said == ["a 0", "breaks 0", "b 0", "a 1", "b 1", "a 2", "b 2"]
    assert talks["a"].facts == {"name": "a", "peak": 7}
    assert talks["a"].median(lambda turn: turn["number"]) == 1
    assert talks["breaks"].failure == "ValueError: no more"
    assert talks["breaks"].median(lambda turn: turn["number"]) is None


def test_a_side_that_is_silent_is_left(side: Path) -> None:
    talks = play([Side("s", side, Path(sys.executable), ["sleeps"])], 1, str, limit_s=1.0)
    assert talks["s"].failure == "silent for 1 s"


def test_overhead_is_the_usual_difference_and_the_share_of_a_checkpoint() -> None:
    bare = [1.0] * 11
    product = [1.01] * 10 + [1.51]  # the last one saved
    found = overhead(product, bare, 1)
    assert found.per_step == pytest.approx(0.01)
    assert found.per_checkpoint == pytest.approx(0.5)
    assert found.total == pytest.approx(0.01 + 0.5 / 200)


def test_models_of_unequal_size_are_said_to_be() -> None:
    near = {name: Talk({"parameters": size, "flops_per_token": 10}) for name, size in (("a", 100), ("b", 104))}
    assert "within 4.0%" in _sizes(near)
    assert "NOT COMPARABLE: 10% apart" in _sizes(near | {"c": Talk({"parameters": 110, "flops_per_token": 10})})


def test_every_script_of_a_side_is_there() -> None:
    scripts = {path.stem for path in SIDES.glob("*_*.py")}
    assert {"step_raymill", "step_nanogpt", "step_transformers", "step_litgpt", "feed_raymill"} <= scripts
    bench = Bench(None, Path(), Path(), True)  # type: ignore[arg-type]
    assert bench.side("x", "feed_raymill", "--warm", 2).script.exists()


def test_the_gpu_script_runs_on_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry", "--layouts", "qwen3", "--json", str(tmp_path / "gpu.json")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())
    by_work = {row["work"]: row for row in rows}
    assert [*by_work][:2] == ["dry qwen3, fp32", "dry qwen3, fp32 + checkpointing"]
    assert [*by_work][2].endswith(" + documents")
    assert all(row["ours"] > 0 for row in rows)
    assert by_work["seconds to 5.4 nats per byte"]["peers"]["GPT-2, AdamW"] > 0
    assert "% MFU" in capsys.readouterr().out


def test_the_microbatch_that_is_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {1: 10.0, 2: 19.0, 4: 18.9, 8: None}  # nearly as fast goes on, no memory ends it

    def measure(machine: object, case: gpu.Case) -> gpu.Measured | None:
        speed = speeds[case.microbatch_size]
        return None if speed is None else gpu.Measured(case, speed, 0.0, 1.0)

    monkeypatch.setattr(gpu, "measure", measure)
    machine = gpu.Machine(gpu.torch.device("cpu"), "cpu", 1, largest_microbatch=64, vocab_size=8, peak=None)
    found = gpu.search_microbatch(machine, gpu.Case(gpu.shape("qwen3", "dry"), "fp32"))
    assert found is not None and found.case.microbatch_size == 2
