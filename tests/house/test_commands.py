"""The README's two commands are the ones run, and --help is quick."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN_COMMAND = "pip install -e . && raymill run jobs/tiny.yaml"
TEST_COMMAND = 'pip install -e ".[dev]" && bash tests/check.sh'
HELP = [sys.executable, "-m", "raymill.cli", "--help"]
HELP_LIMIT_S = 0.3


def commands_of(text: str, start: str) -> list[str]:
    """The lines of a file that are this command, trailing comments off."""
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(start)]


def test_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert commands_of(readme, "pip install") == [MAIN_COMMAND, TEST_COMMAND]


def test_ci_runs_the_readme_test_command() -> None:
    assert commands_of((ROOT / ".ci" / "run").read_text("utf-8"), "pip install") == [TEST_COMMAND]


def test_the_files_the_commands_name_are_there() -> None:
    assert (ROOT / "jobs" / "tiny.yaml").is_file()
    assert (ROOT / "tests" / "check.sh").is_file()


@pytest.mark.parametrize("script", ["tests/check.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_help_is_quick() -> None:
    best_s = min(help_cpu_s() for _ in range(5))
    assert best_s < HELP_LIMIT_S, f"raymill --help took {best_s:.2f} s of CPU"


def help_cpu_s() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(HELP, capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_imports_nothing_heavy() -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(HELP, capture_output=True, text=True, check=True, timeout=60, env=environment)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "raymill" in imported or "typer" in imported
    assert imported & {"ray", "torch", "pydantic", "yaml", "numpy", "pyarrow", "fastapi"} == set()
