"""The one place that starts Ray or attaches to it.

provider local starts Ray inside this process: when the process dies, even by kill -9, so does every Ray process. Any
other provider, or an `address`, attaches to a running cluster; `Cluster.address` says which. Ray starts on first use, so
a run in which everything is cached never pays for it. Starting costs 3 s and, for Ray's own processes, about 0.8 GB of
memory on two cores.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from raymill.cluster import haproxy
from raymill.cluster.config import ClusterConfig, Machines, RoleName
from raymill.cluster.resources import local_gpus, memory_bytes, usable_cpus
from raymill.errors import CapacityError, MachineError, UsageError
from raymill.runs import is_locked

# Read when ray is imported or its processes start, so set before either; what the user has set stays.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # without it, whoever reaches the port runs code as this user
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints tables even at verbose=0
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # Serve looks after replicas: every 0.1 s is 3 % of a core that they lack
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own keeps what it freed: 40 MB more in each process
    "MALLOC_ARENA_MAX": "2",  # a heap for each of Ray's threads is another 30 MB
}
_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the process of a job that was submitted, and nowhere else
_DIAL_TIMEOUT_S = 5.0
_ACCESS_FIX = "export RAY_AUTH_TOKEN_PATH=FILE with the cluster's token (on its head: ~/.ray/auth_token)"
_LONGEST_TEMP = 24  # Ray's socket paths must stay under 107 characters; it adds 80


class Cluster:
    """A cluster file brought to life on first use. A context manager: leaving it stops what it started."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._connected = False
        self._endings: list[Callable[[], None]] = []

    @property
    def address(self) -> str | None:
        """The running cluster to attach to; None where Ray is started here.

        It is the file's `address`, or RAY_ADDRESS where the file names a place that launchers start, or inside a Ray
        job. A plain local run goes by its file alone: a RAY_ADDRESS left in a shell must not send it elsewhere.
        """
        meant = self.config.provider != "local" or _JOB_MARK in os.environ
        return self.config.address or (os.environ.get("RAY_ADDRESS") if meant else None) or None

    def connect(self) -> None:
        """Starts or attaches to Ray; does nothing the second time. MachineError when it cannot."""
        if self._connected:
            return
        address = self.address
        if address is None and self.config.provider != "local":
            raise UsageError(
                f"cluster {self.config.name} ({self.config.provider}) is not running here",
                fix=f"launch it, then `raymill submit`; `raymill plan --on` a {self.config.provider} file writes its launcher files",
            )
        set_environment(foreign=address is not None)
        if address is not None:
            _dial(address)
        else:
            os.environ.pop("RAY_ADDRESS", None)  # Ray's libraries would follow it
            os.environ.update(haproxy.environment(session_folder(), self.config.endpoint.host))
        import ray
        from ray.exceptions import AuthenticationError

        logging.getLogger("ray").setLevel(logging.ERROR)
        options = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "raymill"}
        try:
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=self.local_cpus(),
                    include_dashboard=False,
                    object_store_memory=int(self.config.object_store_gib * 2**30),
                    _temp_dir=str(session_folder()),
                    **options,
                )
            else:
                ray.init(address=address, **options)
        except AuthenticationError:
            raise token_refused(str(address)) from None
        except ConnectionError as error:
            why = (
                f"{' '.join(str(error).split())[:300]}; something listens there, but with another token or Ray version"
            )
            what = f"the Ray cluster at {address} cannot be joined"
            raise MachineError(what, why=why, fix=_ACCESS_FIX) from None
        except (OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            what = "Ray did not start" if address is None else f"Ray at {address} cannot be used"
            raise MachineError(what, why=why, fix="run `raymill doctor`") from None
        self._connected = True

    @property
    def connected(self) -> bool:
        return self._connected

    def at_close(self, ending: Callable[[], None]) -> None:
        """Has `ending` called before Ray is left: what was started on the cluster must end with this session."""
        self._endings.append(ending)

    def close(self) -> None:
        """Stops Ray if this session started it, Serve with it; else leaves the cluster as it is.

        Every ending runs, and Ray is left, even when one raises; an error that is already on its way stays the one told.
        """
        if not self._connected:
            return
        import ray

        cause = sys.exception()
        self._connected = False
        try:
            with ExitStack() as endings:
                endings.callback(ray.shutdown)
                while self._endings:
                    endings.callback(self._endings.pop(0))
        except Exception as error:
            if cause is None:
                raise
            cause.add_note(f"and then, leaving Ray: {error!r}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def local_cpus(self) -> int:
        """Cores this process may use."""
        return usable_cpus()

    def capacity(self, role: RoleName) -> tuple[float, float]:
        """CPUs and GPUs that workers of a role can have at most."""
        cpus, gpus, _ = self._machine(role)
        return cpus, gpus

    def check_fits(self, role: RoleName, workers: int, where: str) -> None:
        """CapacityError when `workers` of the role can never run at once."""
        size = self.config.roles.of(role)
        each = (size.cpus_per_worker, size.gpus_per_worker, size.memory_gib_per_worker)
        for unit, one, have in zip(("CPUs", "GPUs", "GiB of memory"), each, self._machine(role), strict=True):
            if workers * one > have:
                fits = int(have // one)
                fewer = f"ask for at most {fits} worker{'s' if fits > 1 else ''}, or " if fits else ""
                raise CapacityError(
                    f"{workers} {role} worker{'s do' if workers > 1 else ' does'} not fit on cluster {self.config.name}",
                    where=where,
                    why=f"{workers} x {one:g} = {workers * one:g} {unit}; it has {have:.4g} for this role",
                    fix=f"{fewer}lower roles.{role} in the cluster file",
                )

    def _machine(self, role: RoleName) -> tuple[float, float, float]:
        """CPUs, GPUs and GiB of memory of all machines of a role together, by the cluster file.

        A local file need not describe the cluster that it attaches to: then Ray is asked what it has.
        """
        own = self.config.roles.of(role).machines
        if self.config.provider == "local" and self.address is None:
            return float(self.local_cpus()), float(local_gpus()), memory_bytes() / 2**30
        if self.config.provider == "local" and own is None and self.config.head == Machines():
            return self._resources()
        machines, count = (self.config.head, 1) if own is None else (own, own.max_count)
        return float(machines.cpus * count), float(machines.gpus * count), machines.memory_gib * count

    def _resources(self) -> tuple[float, float, float]:
        self.connect()
        import ray

        have = ray.cluster_resources()
        return have.get("CPU", 0.0), have.get("GPU", 0.0), have.get("memory", 0.0) / 2**30


def set_environment(*, foreign: bool) -> None:
    """What Ray reads from the environment: quiet, and with the right token."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        theirs = Path.home() / ".ray" / "auth_token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(theirs if foreign and theirs.exists() else ensure_token())
    _read_again()


def _read_again() -> None:
    """Ray reads the environment when it is imported, and keeps what it read."""
    raylet: Any = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def token_path() -> Path:
    """Where this user's Ray token is, or will be."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "raymill" / "ray_token"


def ensure_token() -> Path:
    """The Ray token of this user, made on first use and readable by no one else.

    Ray would write its own with mode 644.
    """
    path = token_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_name(f".ray_token.{os.getpid()}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # two first runs at once: the first one's token counts
            os.link(aside, path)
        aside.unlink()
    elif path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return path


def token_refused(address: str) -> MachineError:
    return MachineError(
        f"the Ray cluster at {address} refused the token",
        why="every Ray cluster has a token of its own",
        fix=_ACCESS_FIX,
    )


def temp_root() -> Path:
    """The private folder under which every Ray started by this user keeps its sockets and logs."""
    chosen = Path(tempfile.gettempdir())
    root = (chosen if len(str(chosen)) <= _LONGEST_TEMP else Path("/tmp")) / f"raymill-{os.getuid()}"  # noqa: S108
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if root.is_symlink() or found.st_uid != os.getuid():
        fix = "remove it, or set TMPDIR to a folder of your own"
        raise MachineError(f"{root} belongs to someone else", why="Ray's sockets and logs go there", fix=fix)
    root.chmod(0o700)
    return root


def dead_sessions() -> list[Path]:
    """Folders of Ray sessions whose process is gone."""
    return [lock.parent for lock in temp_root().glob("*/lock") if not is_locked(lock)]


_session_lock: int | None = None  # held as long as this process lives, so that no other removes its folder


def session_folder() -> Path:
    """A folder for this process's Ray alone; removes those that dead processes left."""
    global _session_lock
    for left in dead_sessions():
        shutil.rmtree(left, ignore_errors=True)
    folder = temp_root() / str(os.getpid())
    if _session_lock is None:
        folder.mkdir(mode=0o700, exist_ok=True)
        _session_lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(_session_lock, fcntl.LOCK_EX)
    return folder


def _dial(address: str) -> None:
    """MachineError when nothing listens: Ray itself would try for minutes, and shout meanwhile."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):  # `auto`, or a form that ray.init itself judges at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_DIAL_TIMEOUT_S).close()
    except OSError as error:
        fix = "start the cluster, or correct `address` in the cluster file (or RAY_ADDRESS)"
        raise MachineError(f"no Ray cluster answers at {address}", why=str(error), fix=fix) from None
