"""The session: a private token and folder, quiet, and a clear word when Ray cannot be had."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raymill.cluster import session
from raymill.cluster.config import ClusterConfig, Machines, Role, Roles
from raymill.cluster.session import Cluster
from raymill.errors import CapacityError, MachineError, UsageError


def test_the_token_is_made_once_and_private(home: Path) -> None:
    path = session.ensure_token()
    assert path == home / ".local" / "state" / "raymill" / "ray_token"
    assert path.stat().st_mode & 0o777 == 0o600
    token = path.read_text()
    assert len(token) == 64
    assert session.ensure_token().read_text() == token
    assert [each.name for each in path.parent.iterdir()] == ["ray_token"]


def test_a_token_others_can_read_is_closed(home: Path) -> None:
    session.ensure_token().chmod(0o644)
    assert session.ensure_token().stat().st_mode & 0o777 == 0o600


def test_two_first_runs_at_once_agree(home: Path) -> None:
    code = "from raymill.cluster.session import ensure_token; print(ensure_token().read_text())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({run.communicate(timeout=60)[0] for run in runs}) == 1


@pytest.mark.parametrize(
    ("foreign", "theirs", "expected"), [(False, True, "ours"), (True, True, "theirs"), (True, False, "ours")]
)
def test_which_token(home: Path, foreign: bool, theirs: bool, expected: str) -> None:
    rays = home / ".ray" / "auth_token"
    if theirs:
        rays.parent.mkdir()
        rays.write_text("x")
    session.set_environment(foreign=foreign)
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(rays if expected == "theirs" else session.token_path())
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_the_users_own_token_stays(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mine")
    session.set_environment(foreign=True)
    assert [os.environ.get(each) for each in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")].count("mine") == 1
    assert not session.token_path().exists()


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(session, "_LONGEST_TEMP", 1000)
    monkeypatch.setattr(session, "_session_lock", None)
    return tmp_path


def test_the_temp_folder_is_private(temp: Path) -> None:
    root = session.temp_root()
    assert root == temp / f"raymill-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_temp_folder_made_by_someone_else_is_refused(temp: Path) -> None:
    (temp / f"raymill-{os.getuid()}").symlink_to(temp / "trap")
    (temp / "trap").mkdir()
    with pytest.raises(MachineError, match="belongs to someone else"):
        session.temp_root()


def test_a_long_temp_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: "/var/folders/" + "x" * 40)
    assert len(str(session.temp_root())) < 30


def test_folders_of_dead_sessions_are_removed(temp: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from raymill.cluster import session;"
        f"session.temp_root = lambda: Path({str(session.temp_root())!r});"
        "print(session.session_folder(), flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    mine = session.session_folder()
    assert theirs.is_dir()
    assert session.dead_sessions() == []
    other.kill()
    other.communicate()
    assert session.dead_sessions() == [theirs]
    assert session.session_folder() == mine
    assert not theirs.exists()
    os.close(session._session_lock or 0)


def test_storage_is_a_folder(home: Path) -> None:
    assert ClusterConfig(storage="~/runs").storage == str(home / "runs")
    for wrong in ("s3://bucket/runs", "~nobody-of-this-name/runs"):
        with pytest.raises(ValueError, match=r"; fix: .*path"):
            ClusterConfig(storage=wrong)


def test_nothing_listens_there(home: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(MachineError, match=f"no Ray cluster answers at {address}"):
            Cluster(ClusterConfig(address=address)).connect()
    assert time.monotonic() - began < 5


def test_which_cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = ClusterConfig(provider="aws", name="cloud", region="eu-central-1", storage="/mnt/runs")
    assert Cluster(cloud).address is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert Cluster(ClusterConfig()).address is None  # left in the shell for something else
    assert Cluster(cloud).address == "head:6379"
    assert Cluster(ClusterConfig(address="mine:6379")).address == "mine:6379"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert Cluster(ClusterConfig()).address == "head:6379"


def test_a_local_file_without_machines_asks_the_cluster_it_attaches_to(home: Path) -> None:
    with pytest.raises(MachineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        Cluster(ClusterConfig(address="127.0.0.1:1")).check_fits("train", 100, "train")


LEAVING = """
import sys, ray
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster

def bad():
    raise OSError("bad ending")

try:
    with Cluster(ClusterConfig()) as cluster:
        cluster.connect()
        cluster.at_close(lambda: print("first started"))
        cluster.at_close(bad)
        if sys.argv[1:] == ["fail"]:
            raise ValueError("the real error")
except Exception as error:
    print(error, *getattr(error, "__notes__", []))
print(ray.is_initialized())
"""


@pytest.mark.parametrize(
    ("argument", "said"), [("", "bad ending"), ("fail", "the real error and then, leaving Ray: OSError('bad ending')")]
)
def test_an_ending_that_fails_neither_keeps_ray_nor_hides_an_error(home: Path, argument: str, said: str) -> None:
    command = [sys.executable, "-c", LEAVING, argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["first started", said, "False"]


def test_a_cloud_is_not_here(home: Path) -> None:
    config = ClusterConfig(provider="aws", name="cloud", region="eu-central-1", storage="/mnt/runs")
    with pytest.raises(UsageError, match=r"cluster cloud \(aws\) is not running here"):
        Cluster(config).connect()


@pytest.mark.parametrize(
    ("role", "workers", "said"),
    [
        (Role(cpus_per_worker=1), 5, "5 x 1 = 5 CPUs; it has 4"),
        (Role(cpus_per_worker=8), 1, "1 x 8 = 8 CPUs; it has 4"),
        (Role(gpus_per_worker=1), 1, "1 x 1 = 1 GPUs; it has 0"),
        (Role(memory_gib_per_worker=5), 2, "2 x 5 = 10 GiB of memory; it has 8"),
    ],
)
def test_what_does_not_fit(role: Role, workers: int, said: str) -> None:
    config = ClusterConfig(address="x:1", head=Machines(cpus=4, memory_gib=8), roles=Roles(train=role))
    with pytest.raises(CapacityError) as caught:
        Cluster(config).check_fits("train", workers, "train")
    assert said in str(caught.value)
    assert "roles.train" in caught.value.fix


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Machines(cpus=4, memory_gib=8, max_count=3)
    config = ClusterConfig(address="x:1", roles=Roles(train=Role(cpus_per_worker=2, machines=own)))
    Cluster(config).check_fits("train", 6, "train")
    monkeypatch.setattr(session, "usable_cpus", lambda: 2)
    monkeypatch.setattr(session, "memory_bytes", lambda: 4 * 2**30)
    Cluster(ClusterConfig()).check_fits("train", 2, "train")
    with pytest.raises(CapacityError, match=r"hint: ask for at most 2 workers"):
        Cluster(ClusterConfig()).check_fits("train", 3, "train")


# Ray is imported before the token exists and before raymill: the worst order.
WHOLE = """
import os, sys, ray
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
with Cluster(ClusterConfig()) as cluster:
    cluster.connect()
    cluster.connect()
    print(ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
    if sys.argv[1:] == ["hold"]:
        sys.stdin.read()
print(cluster.connected)
"""


def test_a_whole_session_is_quiet(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "42\nFalse\n"
    assert done.stderr == ""
    assert not (home / ".ray" / "auth_token").exists()


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_of_ray_outlives_its_process(home: Path, number: int) -> None:
    command = [sys.executable, "-c", WHOLE, "hold"]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "42\n"
    assert processes_naming(f"/{run.pid}/session_")
    os.kill(run.pid, number)
    run.wait(30)
    deadline = time.monotonic() + 90
    while processes_naming(f"/{run.pid}/session_") and time.monotonic() < deadline:
        time.sleep(1)
    assert processes_naming(f"/{run.pid}/session_") == []


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [command] if text in command else []
    return found
