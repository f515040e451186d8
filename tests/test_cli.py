"""What a user who makes a mistake sees: one message with the fix, the right exit code, nothing half done."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raymill.artifact import Artifact, Draft
from raymill.config import Config
from raymill.runs import locked

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


def test_what_the_machine_refuses_is_one_message(folder: Path) -> None:
    message = refused(folder, 1, "plan", "job.yaml", "--write", "job.yaml")
    assert "job.yaml cannot be used" in message and "File exists" in message


def test_a_full_disk_is_one_message(folder: Path) -> None:
    (folder / "runs" / "small").mkdir(parents=True)
    code = (
        "import errno, os, sys; from raymill import pipeline, cli\n"
        "def full(path, content): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "pipeline.write_atomic = full; sys.argv = ['raymill', 'run', 'job.yaml']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr and "hint: free space" in done.stderr


def test_wrong_options_are_refused_by_the_parser(folder: Path) -> None:
    done = raymill(folder, "run", "job.yaml", "--sett", "a=b")
    assert done.returncode == 2 and "--sett" in done.stderr and "Traceback" not in done.stderr


def test_options_that_contradict_each_other(folder: Path) -> None:
    assert "--no-serve" in refused(folder, 2, "run", "job.yaml", "--detach", "--no-serve")
    assert "train.steps=3 is of a job" in refused(folder, 2, "stop", "--set", "train.steps=3")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on(folder: Path, number: int) -> None:
    code = (
        "import sys, time; from raymill import pipeline, cli\n"
        "pipeline.run = lambda *_, **__: (print('runs', flush=True), time.sleep(60))\n"
        "sys.argv = ['raymill', 'run', 'job.yaml']; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "runs\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted; the same command continues\n")


def make_run(folder: Path, job: str, *stages: str) -> Path:
    """A run whose checkpoints, one by stage, hold nothing."""
    run = folder / "my runs" / "small"
    for number, stage in enumerate(stages):
        if number:
            time.sleep(1.1)  # artifacts know when they were made to the second
        made = Draft(run / f"{stage}-0000000{number}")
        made.publish("checkpoint", stage, config=Config(), inputs={}, summary="", figures={})
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.yaml").write_text(job)
    (run / "cluster.yaml").write_text("endpoint: {port: 8765}\n")
    return run


def test_a_run_without_a_model_is_not_served(folder: Path) -> None:
    make_run(folder, JOB)
    message = refused(folder, 2, "serve", "small", "--set", "cluster.storage=my runs")
    assert "run small has no model to serve" in message


def test_the_keys_of_an_endpoint_that_is_up_are_not_replaced_under_it(folder: Path, tokens: Artifact) -> None:
    run = folder / "runs" / "small"
    with locked(run):
        (run / "run.yaml").write_text(f"name: small\nstart_from: {tokens.path}\nserve: {{}}\n")
        (run / "cluster.yaml").write_text("{}")
        (run / "api_keys.json").write_text("[]")
        assert "is in use" in refused(folder, 1, "serve", "small", "--new-key")
    assert (run / "api_keys.json").exists()


@pytest.mark.parametrize(("section", "replicas"), [("serve: {replicas: 7}\n", 7), ("", 2)])
def test_serve_starts_the_newest_model_and_nothing_else(folder: Path, section: str, replicas: int) -> None:
    make_run(folder, JOB + section, "train", "compress")
    code = (
        "import sys; from raymill import pipeline, cli\n"
        "def run(job, cluster, *, stages, given, **_):\n"
        "    print(job.name, job.serve.replicas, *stages, cluster.config.endpoint.port, *given.values(), sep='|')\n"
        "pipeline.run = run; sys.argv = ['raymill', 'serve', '--set', 'cluster.storage=my runs']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"small|{replicas}|serve|monitor|8765|my runs/small/compress-00000001\n", done.stderr


def test_every_command_finds_a_run_by_its_storage(folder: Path) -> None:
    make_run(folder, JOB, "train")
    there = ("--set", "cluster.storage=my runs")
    assert "small" in raymill(folder, "runs", "ls", *there).stdout
    assert "train-00000000" in raymill(folder, "runs", "show", *there).stdout
    assert raymill(folder, "stop", "small", *there).stdout == "small is not running\n"
    assert raymill(folder, "runs", "rm", "small", "--yes", *there).stdout == "deleted my runs/small\n"
    assert not list((folder / "my runs").iterdir())


def test_detached_and_not_started_the_key_is_still_shown_and_nothing_stays_up(folder: Path) -> None:
    make_run(folder, JOB, "train")
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path; from raymill import pipeline, cli\n"
        "start = subprocess.Popen\n"
        "def popen(command, **options):\n"
        "    child = start([sys.executable, '-c', 'import time; time.sleep(60)'], **options)\n"
        "    print(child.pid, flush=True)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.5)\n"
        "    return child\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "subprocess.Popen = popen; pipeline.run = lambda *_, **__: None\n"
        "sys.argv = ['raymill', 'run', 'job.yaml', '--detach', '--set', 'cluster.storage=my runs']; cli.main()"
    )
    (folder / "job.yaml").write_text(JOB + "serve: {}\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130, done.stderr
    pid, key = done.stdout.splitlines()
    assert "API key" in key and "sk-" in key
    assert not Path("/proc", pid).exists()


def test_text_too_small_for_one_batch(folder: Path) -> None:
    for number in (1, 2):
        text = f"Text number {number} has a few plain words.\n" * 5
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "texts" / "one.txt").unlink()
    keep = ("--set", "prepare.rules=[]", "--set", "prepare.near_duplicates=false")
    done = raymill(folder, "run", "job.yaml", *keep)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: the train split is too small for one batch") and "hint: " in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["prepare", "tokenize"]


def test_a_schema_describes_every_stage(folder: Path) -> None:
    import json

    schema = json.loads(raymill(folder, "config", "schema").stdout)
    assert {"prepare", "train", "serve"} <= schema["properties"].keys()
    assert "cpus_per_worker" in json.dumps(json.loads(raymill(folder, "config", "schema", "cluster").stdout))
