"""What a user who makes a mistake sees: one message with the fix, the right exit code, nothing half done."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """\
name: small
prepare:
  sources: [texts]
tokenize:
  vocab_size: 300
train:
  steps: 5
  optimizer:
    learning_rate: 1e-3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("one short text")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def raymill(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raymill.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def refused(folder: Path, code: int, *arguments: str) -> str:
    """The one message of a command that must fail with `code` and leave no run behind."""
    done = raymill(folder, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and "hint: " in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.glob("runs/*/*-*/manifest.json"))
    return done.stderr


def test_an_unknown_key_names_file_line_and_the_nearest_one(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB.replace("learning_rate", "learnin_rate"))
    message = refused(folder, 2, "run", "job.yaml")
    assert "job.yaml:9: train.optimizer.learnin_rate is not a setting" in message
    assert "did you mean learning_rate?" in message


def test_every_mistake_is_said_at_once(folder: Path) -> None:
    text = JOB.replace("vocab_size: 300", "vocab_size: many").replace("steps: 5", "steps: 0")
    (folder / "job.yaml").write_text(text)
    message = refused(folder, 2, "run", "job.yaml")
    assert "job.yaml:5: tokenize.vocab_size" in message and "job.yaml:7: train.steps" in message


def test_a_job_file_that_is_not_there(folder: Path) -> None:
    assert "did you mean job.yaml?" in refused(folder, 2, "run", "jbo.yaml")


def test_text_that_is_not_there(folder: Path) -> None:
    assert "text/one" in refused(folder, 2, "run", "job.yaml", "--data", "text/one")


def test_a_folder_without_text_and_one_whose_text_is_all_dropped(folder: Path) -> None:
    (folder / "texts" / "one.txt").unlink()
    assert "texts" in refused(folder, 1, "run", "job.yaml")
    (folder / "texts" / "one.txt").write_text("")
    refused(folder, 1, "run", "job.yaml")


def test_a_cluster_that_cannot_fit_the_job(folder: Path) -> None:
    message = refused(
        folder, 2, "run", "job.yaml", "--set", "train.num_workers=64", "--set", "train.global_batch_size=512"
    )
    assert "64 train workers do not fit" in message


def test_a_port_that_is_taken_is_said_before_any_work(folder: Path) -> None:
    with (folder / "job.yaml").open("a") as file:
        file.write("evaluate: {}\ncompress: {}\nserve: {}\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(folder, 1, "run", "job.yaml", "--set", f"cluster.endpoint.port={port}")
    assert str(port) in message and "cluster.endpoint.port" in message


def test_a_run_that_is_not_there(folder: Path) -> None:
    assert "there is no run" in refused(folder, 2, "runs", "show", "nothing")
    assert "there is no run" in refused(folder, 2, "serve")


def test_a_storage_that_refuses_writes(folder: Path) -> None:
    (folder / "file").write_text("")
    assert "cannot be written" in refused(folder, 1, "run", "job.yaml", "--set", "cluster.storage=file/runs")


def test_a_schema_describes_every_stage(folder: Path) -> None:
    import json

    schema = json.loads(raymill(folder, "config", "schema").stdout)
    assert {"prepare", "train", "serve"} <= schema["properties"].keys()
    assert "cpus_per_worker" in json.dumps(json.loads(raymill(folder, "config", "schema", "cluster").stdout))
