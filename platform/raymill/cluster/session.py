"""The one place that starts Ray or attaches to it.

provider local starts Ray inside this process: when the process dies, even by kill -9, so does every Ray process. Any
other provider, or an `address`, attaches to a running cluster. Ray starts on first use, so a run in which everything is
cached never pays for it.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from pathlib import Path
from types import TracebackType

from raymill.cluster.config import ClusterConfig, RoleName
from raymill.errors import CapacityError, MachineError, UsageError

# Read when ray is imported or its processes start, so set before either. Why each: RAY.md's pitfalls.
_QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints tables even at verbose=0
    "TOKENIZERS_PARALLELISM": "false",
}


class Cluster:
    """A cluster file brought to life on first use. A context manager: leaving it stops what it started."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._connected = False

    def connect(self) -> None:
        """Starts or attaches to Ray; does nothing the second time."""
        if self._connected:
            return
        os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
        address = self.config.address or os.environ.get("RAY_ADDRESS")
        if address is None and self.config.provider != "local":
            raise UsageError(
                f"cluster {self.config.name} ({self.config.provider}) is not running here",
                fix=f"launch it, then `raymill submit`; `raymill plan --on` a {self.config.provider} file writes its launcher files",
            )
        if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(ensure_token())
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        options = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "raymill"}
        try:
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=self.local_cpus(),
                    include_dashboard=False,
                    object_store_memory=int(self.config.object_store_gib * 2**30),
                    _temp_dir=_temp_folder(),
                    **options,
                )
            else:
                ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0][:300]
            raise MachineError("Ray did not start", why=why, fix="run `raymill doctor`") from None
        self._connected = True

    @property
    def connected(self) -> bool:
        return self._connected

    def close(self) -> None:
        """Stops Serve and Ray if this session started them."""
        if not self._connected:
            return
        import ray

        ray.shutdown()
        self._connected = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def local_cpus(self) -> int:
        """Cores this process may use."""
        return len(os.sched_getaffinity(0))

    def capacity(self, role: RoleName) -> tuple[float, float]:
        """CPUs and GPUs that workers of a role can have at most, from the cluster file alone."""
        if self.config.provider == "local" and self.config.address is None:
            return float(self.local_cpus()), float(_local_gpus())
        machines = self.config.roles.of(role).machines
        if machines is None:
            return float(self.config.head.cpus), float(self.config.head.gpus)
        return float(machines.cpus * machines.max_count), float(machines.gpus * machines.max_count)

    def check_fits(self, role: RoleName, workers: int, where: str) -> None:
        """CapacityError when `workers` of the role can never run at once."""
        size = self.config.roles.of(role)
        cpus, gpus = self.capacity(role)
        for unit, each, have in (("CPUs", size.cpus_per_worker, cpus), ("GPUs", size.gpus_per_worker, gpus)):
            if workers * each > have:
                raise CapacityError(
                    f"{workers} {role} workers do not fit on cluster {self.config.name}",
                    where=where,
                    why=f"they need {workers * each:g} {unit} ({each:g} each); it has {have:g} for this role",
                    fix=f"ask for at most {int(have // each)} workers, or lower roles.{role} in the cluster file",
                )


def ensure_token() -> Path:
    """The Ray token of this user, made on first use and readable by no one else.

    Ray would write its own with mode 644.
    """
    home = Path(os.environ.get("XDG_STATE_HOME", str(Path.home() / ".local" / "state"))) / "raymill"
    path = home / "ray_token"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = home / f".ray_token.{os.getpid()}"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        aside.replace(path)
    return path


def _temp_folder() -> str:
    """A short private folder: Ray's socket paths must stay under 107 characters."""
    folder = Path(tempfile.gettempdir()) / f"raymill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder)


def _local_gpus() -> int:
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
