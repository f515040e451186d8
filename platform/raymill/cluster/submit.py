"""Send a job to a running Ray cluster as a Ray job, follow its log, end with its status.

On this machine (provider local) the job runs in the folder and with the Python of whoever submits, so every path means
what it means here. Anywhere else the package, the job file and the cluster file travel with it, about 1 MB. In the
cluster the same `raymill run` does the work: it finds the cluster by RAY_ADDRESS, which Ray sets for a job.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import raymill
from raymill import config as settings
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import set_environment, token_refused
from raymill.errors import MachineError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
_STOP_S = 30  # what a job has to end its stages before it is killed
_LOST_AFTER_S = 60.0


def submit(
    job: Path, on: Path | None, overrides: Sequence[str], *, address: str | None, on_line: Callable[[str], None]
) -> int:
    """Runs the job there and gives every line of its log to `on_line`; 0 when it succeeded, 1 when it did not.

    Ctrl-C stops the job and comes back as KeyboardInterrupt. MachineError when no cluster answers at `address`, when it
    refuses the token, or when it is lost on the way.
    """
    place = settings.load(ClusterConfig, on, [each[8:] for each in overrides if each.startswith("cluster.")])
    client = _client(address or DASHBOARD, place)
    with tempfile.TemporaryDirectory() as parcel:
        if place.provider == "local":
            command = [sys.executable, *_command(str(job), str(on) if on else None, overrides)]
            entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
            environment: dict[str, Any] = {}
        else:
            names = _pack(Path(parcel), job, on)
            entrypoint = f"exec {shlex.join(['python', *_command(*names, overrides)])}"
            package = str(Path(raymill.__file__).parent)
            environment = {"working_dir": parcel, "py_modules": [package], "excludes": ["**/__pycache__"]}
        environment["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), "PYTHONUNBUFFERED": "1"}
        job_id = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    try:
        asyncio.run(_follow(client, job_id, on_line))
    except KeyboardInterrupt:
        _stop(client, job_id)
        raise
    status = client.get_job_status(job_id)
    if status == "SUCCEEDED":
        return 0
    message = client.get_job_info(job_id).message or "no reason given"
    on_line(f"job {job_id} {str(status.value).lower()}: {message.splitlines()[0]}")
    return 1


def _client(address: str, place: ClusterConfig) -> JobSubmissionClient:
    # Machines that our launcher file started hold this user's own token; others have one of their own.
    set_environment(foreign=place.provider in ("local", "kubernetes"))
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # the first call that asks for the token
    except AuthenticationError:
        raise token_refused(address) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        fix = "start the cluster, bring its dashboard here (`ray dashboard`), or name it: --address http://HOST:8265"
        raise MachineError(f"no Ray cluster answers at {address}", why=why, fix=fix) from None
    return client


def _command(job: str, on: str | None, overrides: Sequence[str]) -> list[str]:
    return ["-m", "raymill.cli", "run", job, *(["--on", on] if on else []), *(f"--set={each}" for each in overrides)]


def _pack(parcel: Path, job: Path, on: Path | None) -> tuple[str, str | None]:
    """Puts the files to send into a folder; their names there."""
    shutil.copyfile(job, parcel / "job.yaml")
    if on is None:
        return "job.yaml", None
    shutil.copyfile(on, parcel / "cluster.yaml")
    return "job.yaml", "cluster.yaml"


async def _follow(client: JobSubmissionClient, job_id: str, on_line: Callable[[str], None]) -> None:
    """Every line of the log, once, until the job has ended; a broken connection is taken up again."""
    import aiohttp

    seen, rest, heard_at = 0, "", time.monotonic()

    def take(text: str) -> None:
        nonlocal rest
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            on_line(line)

    while True:
        position = 0  # each connection tells the log from its first character
        try:
            async for chunk in client.tail_job_logs(job_id):
                take(chunk[max(0, seen - position) :])
                position += len(chunk)
                seen, heard_at = max(seen, position), time.monotonic()
            if client.get_job_status(job_id).is_terminal():
                break
            heard_at = time.monotonic()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if time.monotonic() - heard_at > _LOST_AFTER_S:
                fix = f"the job may still run; see `ray job logs --follow {job_id}`"
                raise MachineError("the cluster no longer answers", why=str(error)[:300], fix=fix) from None
        await asyncio.sleep(1)
    take(client.get_job_logs(job_id)[seen:])
    if rest:
        on_line(rest)


def _stop(client: JobSubmissionClient, job_id: str) -> None:
    """Asks the job to end, and waits until it has."""
    client.stop_job(job_id)
    deadline = time.monotonic() + _STOP_S + 10
    while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
