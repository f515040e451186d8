"""A job sent to a real Ray cluster on this machine: its log comes line by line, its status is the answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill.cluster import submit as submitting
from raymill.cluster.session import ensure_token
from raymill.cluster.submit import submit
from raymill.errors import ConfigError

JOB = "name: sent\nprepare: {{sources: [{sources}]}}\n"
FAR = """
name: far
provider: on_premise
storage: {storage}
ssh: {{user: nobody, private_key: none, hosts: [nowhere]}}
head: {{cpus: 2}}
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Head:
    """A Ray head of its own ports, folder and token."""

    def __init__(self, folder: Path) -> None:
        self.ports = {
            name: free_port()
            for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        }
        self.url = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        self.address = f"127.0.0.1:{self.ports['port']}"
        self.log = folder / "head.log"
        ports = [f"--{name}={port}" for name, port in self.ports.items()]
        options = [
            "--dashboard-host=127.0.0.1",
            "--num-cpus=2",
            "--object-store-memory=100000000",
            f"--temp-dir={folder}",
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *ports, *options]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's `python` is the one found here
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ensure_token())}
        environment = {**os.environ, **token, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/api/version", timeout=2).close()
            except urllib.error.HTTPError:
                return  # it asks for its token: it is up
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # all of Ray is in this group; SIGTERM takes it half a minute
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # The token is the one that Ray sessions of other tests have: one process can hold only one.
    with tempfile.TemporaryDirectory(prefix="rm", dir="/tmp") as short, pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(ensure_token()))
        running = Head(Path(short))
        try:
            running.wait_until_up()
            yield running
        finally:
            running.stop()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:30]:
        (tmp_path / "texts" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(sources=tmp_path / "texts"))
    return file


@pytest.mark.slow
def test_the_job_runs_there(head: Head, job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    overrides = [f"cluster.storage={tmp_path / 'runs'}", "name=renamed"]
    assert submit(job, None, overrides, address=head.url, on_line=lines.append) == 0, lines
    results = [line for line in lines if line.startswith("[1/1] prepare")]
    assert len(results) == 1, lines
    assert list((tmp_path / "runs" / "renamed").glob("prepare-*/manifest.json"))
    assert not any("\n" in line for line in lines)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_far_cluster_gets_package_and_files(head: Head, job: Path, tmp_path: Path) -> None:
    on = tmp_path / "far.yaml"
    on.write_text(FAR.format(storage=tmp_path / "runs"))
    lines: list[str] = []
    assert submit(job, on, [], address=head.url, on_line=lines.append) == 0, lines
    assert any("raymill.cli run job.yaml --on cluster.yaml" in line for line in lines)
    assert list((tmp_path / "runs" / "sent").glob("prepare-*/manifest.json"))


@pytest.mark.slow
def test_a_failing_job_gives_1_and_its_message(head: Head, tmp_path: Path) -> None:
    lines: list[str] = []
    assert submit(tmp_path / "none.yaml", None, [], address=head.url, on_line=lines.append) == 1
    assert sum(line.startswith("error: there is no file") for line in lines) == 1, lines
    assert "exit code 2" in lines[-1]


@pytest.mark.slow
def test_ctrl_c_stops_the_job(head: Head, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = [
        "-c",
        "import time, signal\nprint('started', flush=True)\ntry:\n time.sleep(600)\nfinally:\n print('ended')",
    ]
    monkeypatch.setattr(submitting, "_command", lambda *given: endless)
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "started":
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        submit(job, None, [], address=head.url, on_line=on_line)
    from ray.job_submission import JobSubmissionClient

    newest = max(JobSubmissionClient(head.url).list_jobs(), key=lambda each: each.start_time)
    assert newest.status == "STOPPED"


@pytest.mark.slow
def test_a_wrong_token_is_refused(head: Head, job: Path) -> None:
    command = [sys.executable, "-m", "raymill.cli", "submit", str(job), "--address", head.url]
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "refused the token" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr


ATTACH = """
import sys
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
with Cluster(ClusterConfig(address=sys.argv[1])) as cluster:
    cluster.connect()
    import ray
    print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.mark.slow
def test_a_session_attaches_and_leaves_it_running(head: Head) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", ATTACH, head.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


def test_nobody_there(home: Path, job: Path) -> None:
    # In a process of its own: submitting has Ray read its environment again, and this session's Ray must not.
    command = [sys.executable, "-m", "raymill.cli", "submit", str(job), "--address", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no Ray cluster answers at" in done.stderr


def test_a_wrong_cluster_setting_is_told_before_anything_is_sent(home: Path, job: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean storage"):
        submit(job, None, ["cluster.storag=x"], address="http://127.0.0.1:1", on_line=print)
