"""Prepare and tokenize under faults: killed at any point, on a full or read-only disk, with inputs that cannot be read and
on any number of workers they end with the same bytes, or with one message and nothing half done.

Most attempts run without Ray (attempt.py), where every point of a run can be hit; some run as users run them.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill import pipeline
from raymill.artifact import Artifact, Draft
from raymill.cluster.config import ClusterConfig, Role, Roles
from raymill.cluster.session import Cluster
from raymill.errors import DataError
from raymill.runs import locked
from raymill.stages import prepare, tokenize
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress

ATTEMPT = Path(__file__).parent / "attempt.py"
WORDS = "river mountain teacher window garden letter market engine winter village bridge paper the of and to with have"
NOTICE = "This notice stands at the end of many of the pages, and it is the same on all of them."
JOB = """
name: faults
prepare:
  sources:
  - {path: SOURCES/web, name: web}
  - {path: SOURCES/talk, name: talk}
  - {path: SOURCES/own, name: own}
  val_fraction: 0.1
  shard_mib: 0.03
  cut_repeats: line
  pii: {}
  augmentation: {noise_share: 0.3}
tokenize:
  vocab_size: 400
  mixture: {weights: {web: 2, talk: 1}, tokens: 60000}
"""


def write_sources(folder: Path) -> None:
    """Text in every form that matters here, with copies, near copies, repeated lines, personal data and bad records."""
    draw = random.Random(0)

    def text(sentences: int = 40) -> str:
        words = WORDS.split()
        lines = [" ".join(draw.choice(words) for _ in range(12)).capitalize() + "." for _ in range(sentences)]
        lines[3] += " Write to anna.berg@example.org or call +49 30 901820."
        return "\n".join([*lines, NOTICE])

    texts = [text() for _ in range(90)]
    texts[40:50] = texts[:10]
    texts[50:60] = [each.replace("Anna", "Maria", 1) + "\nOne more line." for each in texts[10:20]]
    for name in ("web", "talk", "own"):
        (folder / name).mkdir(parents=True)
    rows = [json.dumps({"text": each}) for each in texts]
    (folder / "web" / "a.jsonl").write_text("\n".join([*rows[:40], "{broken", *rows[40:60]]) + "\n")
    (folder / "web" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[60:70]).encode(), mtime=0))
    pq.write_table(pa.table({"text": texts[70:80]}), folder / "web" / "c.parquet", row_group_size=3)
    for number, each in enumerate(texts[80:]):
        (folder / "own" / f"{number}.txt").write_text(each)
    (folder / "own" / "noise.txt").write_bytes(b"\xff\xfe\xfd")
    turns = [[("user", text(4)), ("assistant", text(6))] for _ in range(30)]
    chats = [[{"role": role, "content": content} for role, content in turn] for turn in turns]
    (folder / "talk" / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in chats))


@dataclass
class Ended:
    """How an attempt ended."""

    code: int
    out: str
    err: str


class Place:
    """A job and its sources, and what the undisturbed run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job.yaml"
        write_sources(folder / "sources")
        self.job.write_text(JOB.replace("SOURCES", str(folder / "sources")))
        whole = self.attempt(folder / "whole", 0)
        assert whole.code == 0, whole.err
        passed = json.loads(whole.out.splitlines()[-1])
        self.points: int = passed["points"]
        self.reports: list[int] = passed["reports"]
        self.hashes = hashes_of(folder / "whole")

    def attempt(self, storage: Path, seed: int, *trouble: object) -> Ended:
        command = [sys.executable, str(ATTEMPT), str(self.job), str(storage), str(seed), *map(str, trouble)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    def command(self, storage: Path) -> list[str]:
        command = [sys.executable, "-m", "raymill.cli", "run", str(self.job)]
        return [*command, "--set", f"cluster.storage={storage}"]

    def check_unharmed(self, storage: Path) -> None:
        """What has its final name in a draft is whole."""
        for draft in storage.glob("faults/*.partial"):
            for file in draft.iterdir():
                name = f"{draft.name.removesuffix('.partial')}/{file.name}"
                if name in self.hashes and file.name != "manifest.json":
                    assert hashlib.sha256(file.read_bytes()).hexdigest() == self.hashes[name], name

    def check_finished(self, storage: Path) -> None:
        """Both artifacts are there, the same to the byte, and nothing else."""
        assert hashes_of(storage) == self.hashes
        assert {path.name for path in (storage / "faults").iterdir() if path.is_dir()} == {
            name.split("/")[0] for name in self.hashes
        }
        assert not [path for path in storage.rglob("*") if path.suffix in (".tmp", ".partial") or path.name == ".work"]


def hashes_of(storage: Path) -> dict[str, str]:
    """sha256 of every file of every artifact, by artifact and path; of the manifests, of their entries for files."""
    found = {}
    for manifest in sorted(storage.glob("faults/*/manifest.json")):
        folder = manifest.parent
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest):
            content = path.read_bytes()
            found[f"{folder.name}/{path.relative_to(folder)}"] = hashlib.sha256(content).hexdigest()
        found[f"{folder.name}/manifest.json"] = json.dumps(json.loads(manifest.read_bytes())["files"])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults"))


def check_kill(place: Place, storage: Path, seed: int, kills: int) -> None:
    """Killed at this many points, every second one within a report, the next attempt ends as if nothing had been."""
    draw = random.Random(seed)
    for number in range(seed, seed + kills):
        point = draw.choice(place.reports) if number % 2 else draw.randint(1, place.points)
        killed = place.attempt(storage, seed, point, "kill")
        assert killed.code in (-signal.SIGKILL, 0), killed.err  # 0: what was left had fewer points
        place.check_unharmed(storage)
    ended = place.attempt(storage, seed + 1)
    assert ended.code == 0, ended.err
    place.check_finished(storage)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_points(place: Place, tmp_path: Path, seed: int) -> None:
    check_kill(place, tmp_path, seed, 1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3, 18))
def test_killed_at_more_random_points(place: Place, tmp_path: Path, seed: int) -> None:
    check_kill(place, tmp_path, seed, 1 + seed % 3)


@pytest.mark.chaos
@pytest.mark.parametrize("points_before_end", range(5, 120, 10))
def test_killed_while_it_publishes_the_last(place: Place, tmp_path: Path, points_before_end: int) -> None:
    """The manifest, the rename and the removal of the work folder are the last points of the run."""
    killed = place.attempt(tmp_path, 0, place.points - points_before_end, "kill")
    assert killed.code == -signal.SIGKILL
    assert place.attempt(tmp_path, 1).code == 0
    place.check_finished(tmp_path)


@contextmanager
def started(place: Place, storage: Path) -> Iterator[subprocess.Popen[str]]:
    """The command a user types, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(place.command(storage), env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def processes_of(session: int, name: str) -> list[int]:
    """Ray's processes whose command begins so, of the session a process leads."""
    listing = subprocess.run(["ps", "-wweo", "pid,sid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    return [int(pid) for pid, sid, command in rows if int(sid) == session and re.match(name, command)]


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("victim", ["command", "worker", "raylet"])
def test_killed_as_users_run_it(place: Place, tmp_path: Path, seed: int, victim: str) -> None:
    """A killed worker costs nothing but time. Where the command itself or its Ray is killed, it is typed again."""
    draw = random.Random(seed)
    with started(place, tmp_path) as process:
        while not list(tmp_path.glob("faults/*/.work/clean-*.json")):
            assert process.poll() is None
            time.sleep(0.02)
        if victim == "worker":
            for _ in range(3):
                time.sleep(draw.uniform(0, 0.5))
                alive = processes_of(process.pid, "ray::Map")
                if alive and process.poll() is None:
                    os.kill(draw.choice(alive), signal.SIGKILL)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
        else:
            time.sleep(draw.uniform(0, 1.0))
            (pid,) = [process.pid] if victim == "command" else processes_of(process.pid, r"\S*/raylet/raylet ")
            os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=120)
    if victim != "worker":
        with started(place, tmp_path) as process:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    place.check_finished(tmp_path)


def check_one_message(ended: Ended, words: str) -> None:
    assert ended.code == 1 and "Traceback" not in ended.err, (ended.code, ended.err)
    message = ended.err[ended.err.index("error: ") :]
    assert "\nerror: " not in message and words in message, message
    assert "\n  why: " in message and "\n  hint: " in message, message


def check_refusal(place: Place, storage: Path, seed: int, what: str) -> None:
    draw = random.Random(seed)
    ended = place.attempt(storage, seed, draw.randint(1, place.points - 200), what)
    check_one_message(ended, os.strerror(getattr(errno, what)))
    assert str(storage) in ended.err, f"it names no file:\n{ended.err}"
    place.check_unharmed(storage)
    ended = place.attempt(storage, seed + 1)
    assert ended.code == 0, ended.err
    place.check_finished(storage)


def test_a_machine_that_refuses_to_write(place: Place, tmp_path: Path) -> None:
    check_refusal(place, tmp_path, 0, "EIO")


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
@pytest.mark.parametrize("seed", range(10, 14))
def test_a_machine_that_refuses_to_write_at_more_points(place: Place, tmp_path: Path, seed: int, what: str) -> None:
    check_refusal(place, tmp_path, seed, what)


@contextmanager
def disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A disk of its own at `folder`; what is given mounts it anew with other options."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(place: Place, storage: Path, stage: str, remount: Callable[[str], None]) -> None:
    """Everything before the stage is there, and room for a part of what the stage writes."""
    if stage == "tokenize":
        (corpus,) = (place.folder / "whole" / "faults").glob("prepare-*")
        shutil.copytree(corpus, storage / "faults" / corpus.name)
    remount(f"size={shutil.disk_usage(storage).used // 1024 + ROOM_KIB[stage]}k")


ROOM_KIB = {"prepare": 400, "tokenize": 150}


@pytest.mark.parametrize("stage", ROOM_KIB)
def test_a_full_disk(place: Place, tmp_path: Path, stage: str) -> None:
    with disk(tmp_path) as remount:
        fill(place, tmp_path, stage, remount)
        ended = place.attempt(tmp_path, 0)
        check_one_message(ended, "No space left on device")
        assert f"{tmp_path}/faults/{stage}-" in ended.err, ended.err
        place.check_unharmed(tmp_path)
        remount("size=64m")
        assert place.attempt(tmp_path, 1).code == 0
        place.check_finished(tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ROOM_KIB)
def test_a_full_disk_as_users_meet_it(place: Place, tmp_path: Path, stage: str) -> None:
    with disk(tmp_path) as remount:
        fill(place, tmp_path, stage, remount)
        with started(place, tmp_path) as process:
            _, err = process.communicate(timeout=120)
        check_one_message(Ended(process.returncode, "", err), "No space left on device")
        assert f"{tmp_path}/faults/{stage}-" in err, err
        place.check_unharmed(tmp_path)
        remount("size=64m")
        with started(place, tmp_path) as process:
            _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        place.check_finished(tmp_path)


def test_a_read_only_disk(place: Place, tmp_path: Path) -> None:
    """From the first moment, and after a kill in the middle."""
    with disk(tmp_path) as remount:
        for point in (0, place.points // 3):
            if point:
                assert place.attempt(tmp_path, 0, point, "kill").code == -signal.SIGKILL
            before = sorted(tmp_path.rglob("*"))
            remount("ro")
            check_one_message(place.attempt(tmp_path, 0), "Read-only file system")
            assert sorted(tmp_path.rglob("*")) == before
            remount("rw")
        assert place.attempt(tmp_path, 1).code == 0
        place.check_finished(tmp_path)


def test_a_second_command_on_the_run_is_refused(place: Place, tmp_path: Path) -> None:
    with locked(tmp_path / "faults"):
        ended = place.attempt(tmp_path, 0)
        assert ended.code == 1 and "Traceback" not in ended.err, ended.err
        assert f"run faults is in use by process {os.getpid()}" in ended.err
        assert [path.name for path in (tmp_path / "faults").iterdir()] == [".lock"]


class Workers:
    """The session's cluster with room for this many data workers."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self.config = ClusterConfig(roles=Roles(data=Role(cpus_per_worker=cluster.local_cpus() / count)))
        self.capacity = cluster.capacity
        self.connect = cluster.connect


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_workers_makes_the_same_bytes(place: Place, tmp_path: Path, cluster: Cluster, count: int) -> None:
    workers: Any = Workers(cluster, count)
    job, folder = pipeline.load_job(place.job), tmp_path / "faults"
    assert job.prepare is not None and job.tokenize is not None
    folder.mkdir()
    given = Inputs({}, Draft(folder / "prepare-00000000"), folder, Progress("prepare"))
    corpus = prepare.run(job.prepare, given, workers)
    given = Inputs({"corpus": corpus}, Draft(folder / "tokenize-00000000"), folder, Progress("tokenize"))
    tokenize.run(job.tokenize, given, workers)
    assert without_hashes(hashes_of(tmp_path)) == without_hashes(place.hashes)


def without_hashes(found: dict[str, str]) -> dict[str, str]:
    return {re.sub(r"-[0-9a-f]{8}/", "/", name): content for name, content in found.items()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' work is done in this process."""
    import raymill.cluster.data

    monkeypatch.setattr(raymill.cluster.data, "map_items", lambda cluster, work, items: map(work, items))


def prepare_here(folder: Path, sources: Path, **changed: object) -> Artifact:
    run_folder = folder / "run"
    run_folder.mkdir(exist_ok=True)
    given = Inputs({}, Draft(run_folder / "prepare-00000000"), run_folder, Progress("prepare"))
    config = prepare.Config(**{"sources": (str(sources),), "shard_mib": 0.002, **changed})  # type: ignore[arg-type]
    return prepare.run(config, given, None)  # type: ignore[arg-type]


class Bad:
    """An open file on a disk that gives nothing any more."""

    closed = False

    def read(self, size: int = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def seek(self, to: int, whence: int = 0) -> int:
        return to

    def tell(self) -> int:
        return 1000

    def close(self) -> None:
        pass

    def __enter__(self) -> Bad:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("name", ["bad.txt", "bad.py", "bad.jsonl", "bad.jsonl.gz", "bad.parquet", "bad.warc"])
def test_a_disk_that_cannot_give_an_input(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: None,
    name: str,
) -> None:
    """Nothing of it is lost: the run ends, and another one reads it all."""
    from raymill.corpus import storage

    sources = tmp_path / "in"
    sources.mkdir()
    for path in sorted((place.folder / "sources" / "own").glob("[0-3].txt")):
        (sources / path.name).write_bytes(path.read_bytes())
    (sources / name).write_bytes(b"y" * 1000)
    opens, opens_arrow = Path.open, storage.open_arrow

    def open_bad(path: Path, *options: Any, **others: Any) -> Any:
        return Bad() if path == sources / name else opens(path, *options, **others)

    def open_arrow_bad(file: Any) -> Any:
        return pa.PythonFile(Bad(), "r") if file.name == name else opens_arrow(file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_bad)
        patch.setattr(storage, "open_arrow", open_arrow_bad)
        with pytest.raises(OSError, match="Input/output error"):
            prepare_here(tmp_path, sources)
    made = prepare_here(tmp_path, sources)
    (lineage,) = [file for file in made.json("card.json")["lineage"]["files"] if file["name"] == name]
    assert not any(str(value).startswith("unreadable") for value in lineage.values()), lineage


def test_nothing_of_sources_that_changed_is_published(place: Place, tmp_path: Path, here: None) -> None:
    """An attempt whose sources changed ends after its shards were written; the next has fewer of them."""
    sources = tmp_path / "in"
    sources.mkdir()
    own = [path for path in sorted((place.folder / "sources" / "own").glob("*.txt")) if path.name != "noise.txt"]
    for path in own[:6]:
        (sources / path.name).write_bytes(path.read_bytes())
    states = iter(["then", "now"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "source_state", lambda config: next(states))
        with pytest.raises(DataError, match="the sources changed while they were read"):
            prepare_here(tmp_path, sources)
    for path in own[3:6]:
        (sources / path.name).unlink()
    made = prepare_here(tmp_path, sources)
    listed = {file["path"] for file in made.json("index.json")["files"]}
    assert {entry.path for entry in made.manifest.files if entry.path.endswith(".parquet")} == listed
