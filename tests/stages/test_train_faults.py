"""Train under faults: killed at any point, on a full disk, with a damaged checkpoint, a stopped worker or fewer of them it
ends with the bytes of the undisturbed run, or with one message and the checkpoints of before whole.

Weights, optimizer state, every step's loss and gradient norm, the validations and the sequences of every step are
compared. Most attempts run without Ray (attempt.py), where every point of a run can be hit; some run as users run them.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raymill.artifact import Artifact
from raymill.cli import main
from raymill.runs import locked
from raymill.stages import train
from raymill.training import loop
from raymill.training.checkpoint import newest_checkpoint, only_writer

ATTEMPT = Path(__file__).parent / "attempt.py"
STEPS, EVERY = 40, 5
JOB = f"""
name: faults
start_from: TOKENS
train:
  num_workers: 1
  model: {{num_layers: 1, model_dim: 32, num_heads: 2, num_kv_heads: 1, hidden_dim: 48, max_seq_len: 32, dropout: 0.1}}
  optimizer: {{name: muon}}
  ema_decay: 0.9
  steps: {STEPS}
  global_batch_size: BATCH
  microbatch_size: 4
  checkpoint_every_steps: {EVERY}
  validate_every_steps: 10
  validation_sequences: 8
"""
TENSORS = ("model.safetensors", "optimizer.safetensors")
TIMES = ("tokens_per_s", "mfu", "memory_bytes", "elapsed_s")


@dataclass
class Ended:
    """How an attempt ended."""

    code: int
    out: str
    err: str


@dataclass
class Found:
    """What a finished run left, without its times."""

    tensors: dict[str, bytes]
    curves: list[list[dict[str, Any]]]


def found_in(storage: Path) -> Found:
    (folder,) = (storage / "faults").glob("train-*")
    assert not folder.name.endswith(".partial"), "it is not published"
    curves = []
    for name in ("metrics.jsonl", "validation.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        curves.append([{key: value for key, value in row.items() if key not in TIMES} for row in rows])
    return Found({name: (folder / name).read_bytes() for name in TENSORS}, curves)


def order_of(storage: Path) -> dict[str, str]:
    """The digest of the sequences of each microbatch, by its step and place; the same whenever a step was redone."""
    found: dict[str, str] = {}
    for line in Path(f"{storage}.order").read_text().splitlines():
        place, _, digest = line.rpartition(" ")
        assert found.setdefault(place, digest) == digest, f"step and place {place} met other sequences"
    return found


class Place:
    """A job of one worker, and what its undisturbed run makes."""

    def __init__(self, folder: Path, tokens: Artifact, batch: int = 8) -> None:
        self.folder = folder
        self.job = folder / "job.yaml"
        self.job.write_text(JOB.replace("TOKENS", str(tokens.path)).replace("BATCH", str(batch)))
        self.whole = folder / "whole"
        self.whole.mkdir()
        whole = self.attempt(self.whole)
        assert whole.code == 0, whole.err
        self.points: int = json.loads(whole.out.splitlines()[-1])["points"]
        self.found = found_in(self.whole)
        self.order = order_of(self.whole)
        assert len(self.found.curves[0]) == STEPS and len(self.order) == batch // 4 * STEPS

    def attempt(self, storage: Path, *trouble: object) -> Ended:
        command = [sys.executable, str(ATTEMPT), str(self.job), str(storage), "0", *map(str, trouble)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    def check_finished(self, storage: Path) -> None:
        """The same bytes, the same curves, the same sequences, and nothing left over."""
        found = found_in(storage)
        assert found.curves == self.found.curves
        for name in TENSORS:
            assert found.tensors[name] == self.found.tensors[name], name
        left = [path for path in storage.rglob("*") if path.suffix in (".tmp", ".partial") or path.name == ".work"]
        assert not left


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokens: Artifact) -> Place:
    return Place(tmp_path_factory.mktemp("faults"), tokens)


def check_kills(place: Place, storage: Path, *kills: tuple[object, ...]) -> None:
    """Killed at each of these points in turn, the next attempt ends as if nothing had been."""
    for number, kill in enumerate(kills):
        killed = place.attempt(storage, *kill)
        ended = (-signal.SIGKILL, 0) if number else (-signal.SIGKILL,)  # 0: what was left had fewer points
        assert killed.code in ended, killed.err
    ended = place.attempt(storage)
    assert ended.code == 0, ended.err
    assert "passed over" not in ended.err, "what a kill leaves has never the name of a checkpoint"
    place.check_finished(storage)
    assert order_of(storage) == place.order


SAVE_POINTS = 15
"""Those of a save: its folder made, each file made, synced and named, the folder synced and named."""


def in_a_save(draw: random.Random) -> tuple[int, str]:
    """A point of any save, and where it lies."""
    return draw.randint(1, SAVE_POINTS), f"/step-{draw.randrange(EVERY, STEPS + 1, EVERY):08d}.partial"


def kill_in_a_save(draw: random.Random) -> tuple[object, ...]:
    point, where = in_a_save(draw)
    return point, "kill", where


def test_killed_again_and_again(place: Place, tmp_path: Path) -> None:
    """Within a save, while a line is written, and at any point."""
    draw = random.Random(1)
    kills = [
        kill_in_a_save(draw),
        (draw.randint(2, 9), "kill", "/metrics.jsonl"),
        (draw.randint(20, 60), "kill"),
    ]
    check_kills(place, tmp_path / "run", *kills)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(10, 30))
def test_killed_at_more_random_points(place: Place, tmp_path: Path, seed: int) -> None:
    """Every second one within a save; some several times."""
    draw = random.Random(seed)
    kills: list[tuple[object, ...]] = []
    for _ in range(1 + seed // 2 % 2):
        kills.append(kill_in_a_save(draw) if seed % 2 else (draw.randint(1, place.points - 5), "kill"))
    check_kills(place, tmp_path / "run", *kills)


def check_one_message(ended: Ended, words: str) -> None:
    assert ended.code == 1 and "Traceback" not in ended.err, (ended.code, ended.err)
    message = ended.err[ended.err.index("error: ") :]
    assert "\nerror: " not in message and words in message, message
    assert "\n  why: " in message and "\n  hint: " in message, message


def check_no_room(ended: Ended, storage: Path, saved_before: bool = True) -> None:
    """The message names what a save needs and what there is; what was saved before is whole."""
    check_one_message(ended, "no checkpoint can be written to ")
    found = re.search(r"; a checkpoint takes ([\d,]+) bytes, ([\d,]+) are free", ended.err)
    assert found, ended.err
    (checkpoints,) = storage.glob("faults/train-*.partial/.work/checkpoints")
    newest = newest_checkpoint(checkpoints, pytest.fail)
    assert (newest is not None) == saved_before
    if newest is not None:
        assert int(found[1].replace(",", "")) == sum(path.stat().st_size for path in newest[0].glob("*.safetensors"))
    assert [path.name for path in checkpoints.iterdir() if path.name.endswith((".partial", ".tmp"))] == []


def check_refused_save(place: Place, storage: Path, seed: int, what: str) -> None:
    point, where = in_a_save(random.Random(seed))
    ended = place.attempt(storage, point, what, where)
    assert os.strerror(getattr(errno, what)) in ended.err
    check_no_room(ended, storage, saved_before=f"/step-{EVERY:08d}." not in where)
    ended = place.attempt(storage)
    assert ended.code == 0, ended.err
    place.check_finished(storage)
    assert order_of(storage) == place.order


def test_a_machine_that_refuses_to_write_in_a_save(place: Place, tmp_path: Path) -> None:
    check_refused_save(place, tmp_path / "run", 0, "EIO")


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_machine_that_refuses_to_write_in_more_saves(place: Place, tmp_path: Path, seed: int, what: str) -> None:
    check_refused_save(place, tmp_path / "run", seed, what)


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("seed", range(20, 26))
def test_a_machine_that_refuses_to_write_anywhere(place: Place, tmp_path: Path, seed: int, what: str) -> None:
    point = random.Random(seed).randint(1, place.points - 40)
    ended = place.attempt(tmp_path / "run", point, what)
    check_one_message(ended, os.strerror(getattr(errno, what)))
    ended = place.attempt(tmp_path / "run")
    assert ended.code == 0, ended.err
    place.check_finished(tmp_path / "run")


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A small disk of its own at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_others_fill_during_a_save(place: Place, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    with disk(storage):
        ended = place.attempt(storage, 2, "fill", "/step-00000020.partial")
        assert "No space left on device" in ended.err
        check_no_room(ended, storage)
        (storage / "ballast").unlink()
        ended = place.attempt(storage)
        assert ended.code == 0, ended.err
        place.check_finished(storage)


def test_a_disk_without_room_for_checkpoints_is_told_before_training(
    place: Place, tmp_path: Path, here: Callable[[Path], Ended]
) -> None:
    storage = tmp_path / "run"
    with disk(storage):
        (storage / "ballast").write_bytes(bytes(8 * 2**20 - 100_000))
        ended = here(storage)
        check_one_message(ended, "has no room for checkpoints")
        assert re.search(r"3 more of [\d,]+ bytes are kept for a moment; [\d,]+ bytes are free", ended.err), ended.err


@pytest.fixture
def here(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], Ended]:
    """An undisturbed attempt in this process: what needs no kill costs a tenth of it so."""
    spec = importlib.util.spec_from_file_location("attempt", ATTEMPT)
    assert spec is not None and spec.loader is not None
    attempt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attempt)

    def run(storage: Path) -> Ended:
        command = ["raymill", "run", str(place.job), "--set", f"cluster.storage={storage}"]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(train, "place_workers", attempt.train_here(str(storage)))
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Ended(int(end.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def halfway(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of an attempt that was killed within its sixth save, with the checkpoints of steps 20 and 25."""
    storage = tmp_path_factory.mktemp("halfway") / "run"
    killed = place.attempt(storage, 3, "kill", "/step-00000030")
    assert killed.code == -signal.SIGKILL, killed.err
    return storage


@pytest.mark.parametrize("damage", ["flip", "cut", "removed"])
@pytest.mark.parametrize("name", [*TENSORS, "ema.safetensors", "config.json", "state.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    place: Place, halfway: Path, tmp_path: Path, here: Callable[[Path], Ended], name: str, damage: str
) -> None:
    storage = tmp_path / "run"
    shutil.copytree(halfway, storage)
    (checkpoints,) = storage.glob("faults/train-*.partial/.work/checkpoints")
    hurt(checkpoints / "step-00000025" / name, damage)
    ended = here(storage)
    assert ended.code == 0, ended.err
    assert "checkpoint step-00000025 is passed over: " in ended.err and name in ended.err
    assert ended.err.count("passed over") == 1, ended.err
    place.check_finished(storage)


def hurt(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    place = random.Random(f"{file.name} {damage}").randrange(len(content))
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1
        file.write_bytes(content)


def test_when_no_checkpoint_is_whole_training_begins_anew(
    place: Place, halfway: Path, tmp_path: Path, here: Callable[[Path], Ended]
) -> None:
    storage = tmp_path / "run"
    shutil.copytree(halfway, storage)
    for file in storage.rglob("optimizer.safetensors"):
        hurt(file, "flip")
    ended = here(storage)
    assert ended.code == 0 and "training starts again from its first step" in ended.err, ended.err
    place.check_finished(storage)


def test_a_second_command_on_the_run_is_refused(
    place: Place, tmp_path: Path, here: Callable[[Path], Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "run"
    with locked(storage / "faults"):
        ended = here(storage)
        check_refused(ended, f"run faults is in use by process {os.getpid()}")
        assert [path.name for path in (storage / "faults").iterdir()] == [".lock"]


def test_a_worker_of_another_command_is_refused(
    place: Place, halfway: Path, tmp_path: Path, here: Callable[[Path], Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that outlives its command, on another machine: the run's lock is gone with the command."""
    storage = tmp_path / "run"
    shutil.copytree(halfway, storage)
    (work,) = storage.glob("faults/train-*.partial/.work")
    before = (work / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "only_writer", partial(only_writer, patience_s=0.1))
    with only_writer(work):
        check_refused(here(storage), f"process {os.getpid()} holds it")
    assert (work / "metrics.jsonl").read_bytes() == before
    assert here(storage).code == 0
    place.check_finished(storage)


def check_refused(ended: Ended, words: str) -> None:
    assert ended.code == 1 and words in ended.err and "Traceback" not in ended.err, ended.err


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, tokens: Artifact) -> Place:
    """A run of seconds: Ray takes one to see that a part of it is dead."""
    return Place(tmp_path_factory.mktemp("long"), tokens, batch=64)


class Command:
    """The command a user types, with a Ray of its own, on this many cores."""

    def __init__(self, place: Place, storage: Path, cores: int, *settings: str) -> None:
        job = storage.with_suffix(".yaml")
        job.write_text(place.job.read_text().replace("num_workers: 1", "num_workers: 2\n  min_workers: 1"))
        self.storage = storage
        self._words = [sys.executable, "-m", "raymill.cli", "run", str(job), "--set", f"cluster.storage={storage}"]
        self._words += [word for setting in settings for word in ("--set", setting)]
        self._cores = sorted(os.sched_getaffinity(0))[:cores]

    def __enter__(self) -> Command:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)  # a child has what its parent had
        try:
            self._process = subprocess.Popen(
                self._words,
                env=environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, before)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, step: int) -> None:
        """Until so many steps are done."""
        while not any(path.read_bytes().count(b"\n") >= step for path in self.work("metrics.jsonl")):
            if self._process.poll() is not None:
                pytest.fail(f"it ended before: {self._process.communicate()[1]}")
            time.sleep(0.005)

    def work(self, name: str) -> list[Path]:
        """Files of this name in the work folder."""
        return list(self.storage.glob(f"faults/train-*.partial/.work/{name}"))

    def processes(self, name: str) -> list[int]:
        """Its processes whose command begins so."""
        listing = subprocess.run(["ps", "-wweo", "pid,sid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
        return [int(pid) for pid, sid, command in rows if int(sid) == self.pid and re.match(name, command)]

    def end(self) -> Ended:
        _, err = self._process.communicate(timeout=240)
        return Ended(self._process.returncode, "", err)

    def finish(self) -> str:
        """What it wrote to stderr."""
        ended = self.end()
        assert ended.code == 0, ended.err
        return ended.err


WORKER = "ray::.*RayTrainWorker"


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("victim", ["command", "worker", "raylet"])
def test_killed_as_users_run_it(long: Place, tmp_path: Path, seed: int, victim: str) -> None:
    """Two workers. A killed one costs nothing but time; where the command or its Ray is killed, it is typed again."""
    draw = random.Random(seed)
    storage = tmp_path / "run"
    storage.mkdir()
    with Command(long, storage, 2) as command:
        command.wait_for(draw.randint(1, STEPS - 15))
        time.sleep(draw.uniform(0, 0.05))
        workers = command.processes(WORKER)
        assert len(workers) == 2
        victims = {"command": [command.pid], "worker": workers, "raylet": command.processes(r"\S*/raylet/raylet ")}
        os.kill(draw.choice(victims[victim]), signal.SIGKILL)
        ended = command.end()
        assert ended.code == 0 or victim != "worker", ended.err
    if ended.code:  # a raylet is missed after a second, in which the last step may be done
        with Command(long, storage, 2) as command:
            assert "passed over" not in command.finish()
    long.check_finished(storage)


@pytest.mark.chaos
def test_one_worker_then_two_then_one(long: Place, tmp_path: Path) -> None:
    """All of the command is killed twice, and it is typed again where there are other cores."""
    storage = tmp_path / "run"
    storage.mkdir()
    for cores, step in ((1, 8), (2, 25)):
        with Command(long, storage, cores) as command:
            command.wait_for(step)
            found = command.processes("")
            workers = command.processes(WORKER)
            for pid in found:  # workers would go on for a second after their command
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert len(workers) == cores
    with Command(long, storage, 1) as command:
        command.finish()
    long.check_finished(storage)


@pytest.mark.chaos
@pytest.mark.parametrize("rank", range(2))
def test_a_stopped_worker_is_replaced(place: Place, tmp_path: Path, rank: int) -> None:
    storage = tmp_path / "run"
    storage.mkdir()
    with Command(place, storage, 2, "train.guard.hang_timeout_s=3") as command:
        command.wait_for(13)
        (holder,) = command.work(".writer")
        workers = sorted(command.processes(WORKER), key=lambda pid: pid != int(holder.read_text()))
        os.kill(workers[rank], signal.SIGSTOP)
        while not (stacks := [path for path in command.work("stacks/*") if path.stat().st_size]):
            time.sleep(0.05)
        assert [path.name for path in stacks] == [f"rank-{1 - rank}.txt"]
        err = command.finish()
    told = f"rank {1 - rank} has not finished a step after step "
    assert err.count(told) == 1 and f"Where its threads stand: stacks/rank-{1 - rank}.txt" in err, err
    (stacks_file,) = storage.glob("faults/train-*/stacks/*")
    assert stacks_file.name == f"rank-{1 - rank}.txt" and told in stacks_file.read_text()
    place.check_finished(storage)


@pytest.mark.chaos
@pytest.mark.parametrize("room_bytes", [0, 40_000])
def test_a_full_disk_as_users_meet_it(place: Place, tmp_path: Path, room_bytes: int) -> None:
    storage = tmp_path / "run"
    with disk(storage):
        with Command(place, storage, 2) as command:
            command.wait_for(12)
            fill(storage, room_bytes)
            ended = command.end()
        check_one_message(ended, "")
        assert "No space left on device" in ended.err, ended.err
        (storage / "ballast").unlink()
        with Command(place, storage, 2) as command:
            assert "passed over" not in command.finish()
        place.check_finished(storage)


def fill(storage: Path, room_bytes: int) -> None:
    with (storage / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(storage).free - room_bytes)
