"""Sides take turns in processes of their own; a command is watched with all it starts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from benchmarks.data import rates
from benchmarks.data.rates import Side, compare
from benchmarks.measure import spread, watch

SIDE = """
import timing

def load(options):
    return lambda texts: [("seen", text.upper()) for text in texts]

timing.run(load)
"""
DAEMON = """
import subprocess, sys, time
hold = "import time; block = bytearray(120_000_000); time.sleep(1.5)"
subprocess.Popen([sys.executable, "-c", hold], start_new_session=True)
time.sleep(1.5)
"""


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sides: `upper`, which works, and `broken`."""
    folder = tmp_path / "sides"
    folder.mkdir()
    (folder / "timing.py").write_text((rates.SIDES / "timing.py").read_text())
    (folder / "upper.py").write_text(SIDE)
    (folder / "broken.py").write_text("raise ImportError('no such library')")
    monkeypatch.setattr(rates, "SIDES", folder)
    return folder


def corpus_file(tmp_path: Path, documents: int) -> Path:
    path = tmp_path / "part.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number:06d}"}) + "\n" for number in range(documents)))
    return path


def test_sides_take_turns(sides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus_file(tmp_path, 500)
    python = Path(sys.executable)
    both = [Side("a", "upper", python, 1.0), Side("b", "upper", python, 0.001), Side("c", "broken", python, 1.0)]
    found = compare(both, [path], 2, tmp_path)
    said = [line.split()[4] for line in capsys.readouterr().err.splitlines() if "round" in line]
    assert said == ["a", "b", "a", "b"]
    assert found["a"].value > 0 and found["a"].rounds == 2
    assert found["a"].megabytes == pytest.approx((500 - 64) * 11 / 1e6)  # warm-up documents are not counted
    assert found["b"].megabytes < found["a"].megabytes
    assert found["c"].failure == "ImportError: no such library"


def test_results_speak_of_the_documents_that_were_timed(sides: Path, tmp_path: Path) -> None:
    compare([Side("a", "upper", Path(sys.executable), 1.0)], [corpus_file(tmp_path, 70)], 1, tmp_path)
    digests = [hashlib.blake2b(b"TEXT %06d" % number, digest_size=8).hexdigest() for number in range(64, 70)]
    assert json.loads((tmp_path / "upper.json").read_text()) == [["seen", digest] for digest in digests]


def test_memory_of_a_process_that_left_the_session_counts(tmp_path: Path) -> None:
    found = watch([sys.executable, "-c", DAEMON], os.sched_getaffinity(0), {}, tmp_path / "log", 30)
    assert found.failure is None
    assert 110e6 < found.peak_bytes < 250e6
    assert 1.5 <= found.wall_s < 10


def test_only_the_command_is_kept_to_its_cores(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    one = {max(before)}
    watch([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], one, {}, tmp_path / "log", 30)
    assert (tmp_path / "log").read_text().strip() == str(one)
    assert os.sched_getaffinity(0) == before


def test_a_failing_command_is_told(tmp_path: Path) -> None:
    found = watch(
        [sys.executable, "-c", "raise SystemExit('no disk')"], os.sched_getaffinity(0), {}, tmp_path / "log", 30
    )
    assert found.failure == "exit 1: no disk"


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found = watch(
        [sys.executable, "-c", "import time; time.sleep(60)"], os.sched_getaffinity(0), {}, tmp_path / "log", 0.6
    )
    assert found.failure == "took more than 0.6 s"
    assert found.wall_s < 10


def test_spread_is_the_quartiles_over_the_median() -> None:
    assert spread([10.0]) == 0.0
    assert spread([10.0, 10.0, 10.0]) == 0.0
    assert spread([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.2)
