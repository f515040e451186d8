"""Ray Serve as the house uses it: one application of equal replicas behind one address.

A cluster has room for one endpoint, at the route "/". The application is named after its run's folder, so that a second
run on a shared cluster is told who is there instead of taking the address over.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.cluster.config import EndpointAddress, Role
from raymill.cluster.haproxy import replica_host
from raymill.cluster.session import session_folder
from raymill.errors import MachineError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import LoggingConfig

_PREFIX = "raymill-"
_DEPLOYMENT = "replica"
_START_TIMEOUT_S = 180.0
_HEALTH_TIMEOUT_S = 30.0
_KEEP_ALIVE_S = 60  # longer than HAProxy keeps an idle connection to a replica: it must not take one that is closing


def application_name(run_folder: Path) -> str:
    """The Serve application of a run: `raymill-<run>-<8 hex digits of its path>`."""
    path = run_folder.absolute()
    return f"{_PREFIX}{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def bind_replicas(
    replica: type, *args: Any, replicas: int, role: Role, environment: dict[str, str], max_ongoing: int
) -> Application:
    """`replica(*args)` in as many workers of the role; it has the ASGI app and its own health check."""
    from ray import serve

    deployment = serve.deployment(
        serve.ingress()(replica),
        name=_DEPLOYMENT,
        num_replicas=replicas,
        ray_actor_options={
            "num_cpus": role.cpus_per_worker,
            "num_gpus": role.gpus_per_worker,
            "runtime_env": {"env_vars": {**environment, "OMP_NUM_THREADS": str(role.threads)}},
        },
        max_ongoing_requests=max_ongoing,
        health_check_period_s=2,
        health_check_timeout_s=3,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_quiet(),
    )
    return deployment.bind(*args)


def check_free(name: str) -> None:
    """MachineError when the cluster serves another run."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # importing it sets INFO
    others = [each for each in serve.status().applications if each.startswith(_PREFIX) and each != name]
    if others:
        run = others[0].removeprefix(_PREFIX).rpartition("-")[0]
        raise MachineError(
            f"this cluster serves run {run} already",
            where="serve",
            why="one cluster has one endpoint; a second one would take its address",
            fix=f"`raymill stop {run}` where it was started (when its process was killed: serve it again, then stop it), "
            "or serve on another cluster",
        )


def deploy(bound: Application, name: str, replicas: int, address: EndpointAddress) -> None:
    """Starts Serve and the replicas, and waits for them. MachineError when they do not come up."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    host = replica_host(session_folder(), address.host)
    options = HTTPOptions(host=host, port=address.port, keep_alive_timeout_s=_KEEP_ALIVE_S)
    serve.start(http_options=options, logging_config=_quiet())
    target = serve.RunTarget(bound, name=name, route_prefix="/", logging_config=_quiet())
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_replicas(name, replicas)


def delete(name: str) -> None:
    """Lets running requests end and stops the replicas: on another machine they would outlive this process.

    Serve itself is left to Ray's end, or to others on a shared cluster; `serve.shutdown` complains on stderr.
    """
    from ray import serve

    serve.delete(name)


def await_health(url: str) -> None:
    """Waits until the API itself answers through the proxy."""
    from urllib.error import URLError
    from urllib.request import urlopen

    deadline = time.monotonic() + _HEALTH_TIMEOUT_S
    while True:
        try:
            with urlopen(f"{url}/health", timeout=5) as response:  # noqa: S310 - our own address
                assert response.status == 200
                return
        except (URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{url} does not answer",
                    why=str(error),
                    fix="run `raymill doctor`; on a shared cluster, Serve may already listen on another port",
                ) from None
            time.sleep(0.1)


def _await_replicas(name: str, count: int) -> None:
    """MachineError, with what Serve says, when they do not come up."""
    from ray import serve

    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        status = serve.status().applications[name]
        replicas = status.deployments.get(_DEPLOYMENT)
        if status.status == "RUNNING" and replicas is not None and replicas.replica_states.get("RUNNING") == count:
            return
        failed = status.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or time.monotonic() > deadline:
            said = (replicas.message if replicas is not None else "") or status.message
            lines = [line for line in said.splitlines() if line.strip()]
            raise MachineError(
                f"the {count} replicas did not start",
                where="serve",
                why=" / ".join(lines[-3:])[-600:] or str(status.status),
                fix="run `raymill doctor`",
            )
        time.sleep(0.1)


def _quiet() -> LoggingConfig:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)
