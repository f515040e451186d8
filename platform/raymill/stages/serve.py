"""Serve: a checkpoint in, replicas behind an OpenAI API out.

Ray Serve starts the replicas, checks their health and spreads requests over them; each replica is an engine with the ASGI
app of `api/` around it and knows nothing of Ray. The endpoint lives until the process that runs the stage ends.

In the run's folder: api_keys.json (0600, hashes of keys) and metrics_key (0600, the key Prometheus sends; it opens
/metrics and nothing else). The first client key is made by `new_key` and shown by `usage_lines`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.artifact import Artifact, Kind, open_artifact, write_atomic
from raymill.cluster.config import ClusterConfig, EndpointAddress, Role, RoleName
from raymill.config import Config as Settings
from raymill.errors import ArtifactError, MachineError
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import LoggingConfig
    from starlette.types import ASGIApp

    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("checkpoint",)
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "endpoint"
ROLE: RoleName = "serve"
LIVE = True

ENDPOINT = "endpoint.json"
API_KEYS = "api_keys.json"
METRICS_KEY = "metrics_key"
_APP = "raymill"
_START_TIMEOUT_S = 180.0


class Config(Settings):
    """How the model is served."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 2
    """Engines side by side; each takes one worker of the serve role."""
    model_name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """The name clients ask for; the run's name without it."""
    max_slots: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions a replica works on at once."""
    max_kv_cache_mib: Annotated[int, Field(ge=1, le=1_048_576)] = 512
    """Memory of a replica for keys and values, MiB; fewer slots are opened when they do not fit."""
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 32
    """Requests that may wait for a slot of a replica; one more is answered 429."""
    prefill_chunk_tokens: Annotated[int, Field(ge=1, le=65536)] = 64
    """Prompt tokens fed in one step: smaller keeps running streams smooth, larger starts new ones sooner."""
    stream_interval_ms: Annotated[int, Field(ge=0, le=1000)] = 20
    """Text of a stream that is ready is written together, at most once in this many milliseconds."""
    max_body_kib: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Largest request body, KiB."""


def demand(config: Config) -> Demand:
    return Demand(config.replicas)


def source_state(config: Config) -> Any:
    return None


def preflight(config: Config, cluster: ClusterConfig) -> None:
    """MachineError when the endpoint's address cannot be had; only asked where the endpoint is on this machine."""
    if cluster.provider != "local" or cluster.address is not None:
        return
    host, port = cluster.endpoint.host, cluster.endpoint.port
    problem = _bind_problem(host, port)
    if problem == errno.EADDRINUSE:
        free = next((each for each in range(port + 1, port + 100) if not _bind_problem(host, each)), port + 1)
        raise MachineError(
            f"port {port} on {host} is taken",
            where="serve",
            why="another process listens there, perhaps an endpoint that is still up",
            fix=f"--set cluster.endpoint.port={free}, or `raymill stop`",
        )
    if problem is not None:
        raise MachineError(
            f"cannot listen on {host}:{port}",
            where="serve",
            why=os.strerror(problem),
            fix="set cluster.endpoint.host and port",
        )


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Starts the replicas and publishes where they answer; they stay up until the cluster session closes."""
    from raymill.cluster.session import session_folder

    began = time.monotonic()
    preflight(config, cluster.config)
    checkpoint, address = inputs["checkpoint"], cluster.config.endpoint
    slots, quantization = _check_checkpoint(config, checkpoint.path)
    _ensure_metrics_key(inputs.run_folder)
    model_name = config.model_name or inputs.run_folder.name
    cluster.connect()
    metrics_folder = session_folder() / f"metrics-{os.urandom(6).hex()}"  # gone with the session, even after kill -9
    cluster.at_close(partial(_stop, metrics_folder))
    keys = inputs.run_folder / API_KEYS
    bound = _bind(
        config,
        cluster.config.roles.serve,
        checkpoint.path,
        keys,
        _api(config, model_name, quantization),
        metrics_folder,
    )
    _deploy(bound, config.replicas, address)
    host = "127.0.0.1" if address.host in ("0.0.0.0", "::") else address.host  # noqa: S104 - compared, not bound
    url = f"http://{host}:{address.port}"
    _await_health(url)
    took_s = time.monotonic() - began
    endpoint = {"url": f"{url}/v1", "host": host, "port": address.port, "model": model_name}
    endpoint |= {"replicas": config.replicas, "pid": os.getpid()}
    write_atomic(inputs.draft.path / ENDPOINT, json.dumps(endpoint) + "\n")
    figures = {**endpoint, "slots_per_replica": slots, "quantization": quantization, "start_s": round(took_s, 2)}
    summary = (
        f"{config.replicas} replica{'s' if config.replicas > 1 else ''} of {model_name} ({quantization}) at {url}/v1, "
        f"{slots} slots each, up in {took_s:.1f} s"
    )
    return inputs.publish("serve", GIVES, config, summary, figures)


def new_key(run_folder: Path) -> str | None:
    """The run's client key when it had none: made now, to be shown once. None when there is one already."""
    from raymill.api.auth import KeyFile

    keys = KeyFile(run_folder / API_KEYS)
    return None if keys.has("client") else keys.create("client")


def forget_keys(run_folder: Path) -> None:
    """Makes every key of the run worthless; the next start makes new ones."""
    (run_folder / API_KEYS).unlink(missing_ok=True)
    (run_folder / METRICS_KEY).unlink(missing_ok=True)


def usage_lines(endpoint: Artifact, key: str | None) -> list[str]:
    """What to show a person: the key (None when it was shown before), a curl line and a snippet that work as printed."""
    from raymill.api.usage import KEY_VARIABLE, usage_snippets

    values, run_name = endpoint.json(ENDPOINT), endpoint.path.parent.name
    lines = [f"API key (shown once): {key}"]
    if key is None:
        lines = [
            f"API key: shown when it was made; `raymill serve {run_name} --new-key` replaces it",
            f"export {KEY_VARIABLE}=sk-...",
        ]
    return [*lines, "", *usage_snippets(values["url"], values["model"], key)]


class Replica:
    """Lives in a Ray Serve replica: the engine and its app."""

    def __init__(self, config: dict[str, Any], checkpoint: str, keys: str, api: dict[str, Any], threads: int) -> None:
        Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).mkdir(mode=0o700, parents=True, exist_ok=True)
        import torch

        from raymill.api.auth import KeyFile
        from raymill.api.routes import Settings as ApiSettings
        from raymill.api.routes import create_app, record_stats
        from raymill.inference.loading import load_engine
        from raymill.telemetry.metrics import Metrics

        torch.set_num_threads(threads)
        settings, metrics = Config(**config), Metrics()
        self._record = partial(record_stats, metrics)
        self._engine, tokenizer = load_engine(
            Path(checkpoint),
            max_slots=settings.max_slots,
            max_kv_cache_bytes=settings.max_kv_cache_mib * 2**20,
            max_queued=settings.max_queued_requests,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            on_stats=self._record,
        )
        self._app = create_app(self._engine, tokenizer, ApiSettings(**api), KeyFile(Path(keys)), metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Asked by Ray Serve; raising has the replica replaced."""
        stats = self._engine.stats()
        self._record(stats)
        if not stats.healthy:
            raise RuntimeError("the engine does not work")

    def __del__(self) -> None:
        self._engine.close()


def _check_checkpoint(config: Config, checkpoint: Path) -> tuple[int, str]:
    """Slots a replica will open and the precision; what a replica would stumble over is said here."""
    from raymill.inference.kv_cache import fit_slots
    from raymill.model.config import ModelConfig
    from raymill.model.weights import read_config

    values = read_config(checkpoint)
    slots = fit_slots(ModelConfig.from_hugging_face(values), config.max_slots, config.max_kv_cache_mib * 2**20)
    return slots, values.get("quantization", {}).get("method", "fp32")


def _ensure_metrics_key(run_folder: Path) -> None:
    from raymill.api.auth import KeyFile, write_private

    keys, plain = KeyFile(run_folder / API_KEYS), run_folder / METRICS_KEY
    if not plain.exists() or keys.role_of(plain.read_text(encoding="utf-8")) != "metrics":
        write_private(plain, keys.create("metrics"))


def _api(config: Config, model_name: str, quantization: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "quantization": quantization,
        "replicas": config.replicas,
        "max_body_bytes": config.max_body_kib * 1024,
        "stream_interval_ms": config.stream_interval_ms,
    }


def application(args: dict[str, Any]) -> Application:
    """What a KubeRay RayService imports: the newest checkpoint of `run_folder` as a Serve application.

    `serve` and `role` in `args` are the job's and the cluster file's sections. Keys are those of the run.
    """
    config, role, run_folder = Config(**args["serve"]), Role(**args["role"]), Path(args["run_folder"])
    made = [open_artifact(path.parent, verify=False) for path in run_folder.glob("*-????????/manifest.json")]
    checkpoints = [artifact for artifact in made if artifact.manifest.kind == "checkpoint"]
    if not checkpoints:
        raise ArtifactError(f"{run_folder} holds no checkpoint", fix="run the job first, then apply the RayService")
    newest = max(checkpoints, key=lambda artifact: artifact.manifest.created_at)
    _, quantization = _check_checkpoint(config, newest.path)
    _ensure_metrics_key(run_folder)
    api = _api(config, config.model_name or run_folder.name, quantization)
    metrics_folder = Path(tempfile.gettempdir()) / f"raymill-metrics-{os.urandom(6).hex()}"
    return _bind(config, role, newest.path, run_folder / API_KEYS, api, metrics_folder)


def _bind(
    config: Config, role: Role, checkpoint: Path, keys: Path, api: dict[str, Any], metrics_folder: Path
) -> Application:
    """The replicas as Serve is to run them."""
    from ray import serve

    environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder), "OMP_NUM_THREADS": str(role.threads)}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": role.cpus_per_worker,
            "num_gpus": role.gpus_per_worker,
            "runtime_env": {"env_vars": environment},
        },
        # Above what a replica takes: its own queue answers 429 at once, Serve's would let a client wait.
        max_ongoing_requests=config.max_slots + config.max_queued_requests + 1000,
        health_check_period_s=2,
        health_check_timeout_s=3,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_quiet(),
    )
    return deployment.bind(
        config.model_dump(mode="json"), str(checkpoint.absolute()), str(keys.absolute()), api, role.threads
    )


def _quiet() -> LoggingConfig:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _deploy(bound: Application, replicas: int, address: EndpointAddress) -> None:
    """Starts Serve and the replicas, and waits for them."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # importing it sets INFO
    serve.start(http_options=HTTPOptions(host=address.host, port=address.port), logging_config=_quiet())
    target = serve.RunTarget(bound, name=_APP, route_prefix="/", logging_config=_quiet())
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_replicas(replicas)


def _await_replicas(count: int) -> None:
    """MachineError, with what Serve says, when they do not come up."""
    from ray import serve

    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        status = serve.status().applications[_APP]
        replicas = status.deployments.get("replica")
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


def _await_health(url: str) -> None:
    """Waits until the API itself answers through the proxy."""
    from urllib.error import URLError
    from urllib.request import urlopen

    deadline = time.monotonic() + 30
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


def _stop(metrics_folder: Path) -> None:
    """Lets running requests end and stops the replicas: on another machine they would outlive this process.

    Serve itself is left to Ray's end, or to others on a shared cluster; `serve.shutdown` complains on stderr.
    """
    from ray import serve

    serve.delete(_APP)
    shutil.rmtree(metrics_folder, ignore_errors=True)


def _bind_problem(host: str, port: int) -> int | None:
    """The errno that listening there gives, or None."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return None
