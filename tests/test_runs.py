"""What can be done with a run from outside: who has it, stop it, remove it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill import runs
from raymill.artifact import Draft
from raymill.config import Config
from raymill.errors import ArtifactError, MachineError

HOLD = """
import signal, sys, time
from pathlib import Path
from raymill.runs import locked
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, interrupt)
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.yaml").write_text("name: mine")
    return folder


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_is_trained_says_by_whom_and_how_to_stop_it(run: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(MachineError, match=f"run mine is in use by process {holder.pid}") as caught, runs.locked(run):
        pass
    assert f"raymill stop mine --set 'cluster.storage=\"{run.parent}\"'" in caught.value.fix
    with pytest.raises(MachineError, match="in use"):
        runs.remove_run(run)
    assert runs.list_runs(run.parent) == [run]


def test_stopping_interrupts_whatever_has_the_run(run: Path, holder: subprocess.Popen[str]) -> None:
    assert runs.stop_run(run)
    assert holder.wait(5) == 130
    assert not runs.stop_run(run)


def test_a_dead_or_foreign_process_is_not_named_and_not_signalled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid) if number else kill(pid, 0))
    with (run / ".lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for content in ("", f"999999999 {socket.gethostname()}", f"{os.getpid()} another-machine"):
            (run / ".lock").write_text(content)
            with pytest.raises(MachineError, match="not on this machine"):
                runs.stop_run(run)
        with pytest.raises(MachineError, match="in use by another process"), runs.locked(run):
            pass
    assert signalled == []


def test_a_look_at_the_lock_bars_nobody(run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        with runs.locked(run):
            pass


def test_a_run_removed_between_opening_and_locking_is_made_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def remove_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        shutil.rmtree(run)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with runs.locked(run):
        assert (run / ".lock").exists()


def _remove_and_die(run: Path) -> None:
    shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    runs.remove_run(run)


def test_killed_while_removing_nothing_of_the_run_is_listed_and_the_next_removal_sweeps(run: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_remove_and_die, args=(run,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert runs.list_runs(run.parent) == []
    assert list(run.parent.iterdir())
    other = run.parent / "other"
    other.mkdir()
    runs.remove_run(other)
    assert list(run.parent.iterdir()) == []


def test_an_endpoint_is_up_only_while_its_process_has_the_run(run: Path) -> None:
    with runs.locked(run):
        runs.write_live(run, "http://127.0.0.1:1")
        assert runs.read_live(run) == runs.Live(os.getpid(), "http://127.0.0.1:1")
    assert runs.read_live(run) is None


def test_a_damaged_newest_artifact_is_told_and_no_older_one_taken_for_it(tmp_path: Path) -> None:
    for stage in ("compress", "train"):  # of one second: the name decides
        draft = Draft(tmp_path / f"{stage}-00000000")
        (draft.path / "model").write_text(f"weights of {stage}")
        draft.publish("checkpoint", stage, config=Config(), inputs={}, summary="", figures={})
    newest = runs.newest(tmp_path, lambda manifest: manifest.kind == "checkpoint")
    assert newest is not None and newest.manifest.stage == "train"
    assert runs.newest(tmp_path, lambda manifest: manifest.kind == "corpus") is None
    (tmp_path / "train-00000000" / "model").write_text("cut")
    with pytest.raises(ArtifactError, match="model is damaged") as told:
        runs.newest(tmp_path, lambda manifest: manifest.kind == "checkpoint")
    assert "delete" in told.value.fix
    other = runs.newest(tmp_path, lambda manifest: manifest.stage == "compress")
    assert other is not None and other.manifest.stage == "compress", "what is not asked for may be damaged"
