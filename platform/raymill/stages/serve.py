"""Serve: a checkpoint in, replicas behind an OpenAI API out.

Ray Serve starts the replicas, checks their health and spreads requests over them; each replica is an engine with the ASGI
app of `api/` around it and knows nothing of Ray. The endpoint lives until the process that runs the stage ends. Its keys
are files of the run's folder (api/keys.py): the first client key is made by `new_key` and shown by `usage_lines`.

A replica computes on the CPU, or on its GPU where the serve role has `gpus_per_worker` above 0.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.api.keys import API_KEYS, ensure_metrics_key
from raymill.api.keys import forget_keys as forget_keys
from raymill.api.keys import new_key as new_key
from raymill.artifact import Artifact, Kind, open_artifact, write_atomic
from raymill.cluster.config import ClusterConfig, Role, RoleName
from raymill.cluster.ports import check_endpoint_address
from raymill.config import Config as Settings
from raymill.errors import ArtifactError, MachineError, UsageError
from raymill.inference.kv_cache import KvPrecision
from raymill.inference.loading import Device, EngineName
from raymill.inference.requests import Engine, Request
from raymill.inference.sampling import Sampling
from raymill.runs import newest
from raymill.stages.contract import Demand, Inputs
from raymill.telemetry.progress import Progress

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp

    from raymill.cluster.session import Cluster
    from raymill.tokenizer.tokenizer import Tokenizer

TAKES: tuple[Kind, ...] = ("checkpoint",)
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "endpoint"
ROLE: RoleName = "serve"
LIVE = True

ENDPOINT = "endpoint.json"
_COMPILES_SILENTLY_S = 1.0

ModelName = Annotated[str, Field(min_length=1, max_length=128)]


class Config(Settings):
    """How the model is served."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 2
    """Engines side by side; each takes one worker of the serve role."""
    model_name: ModelName | None = None
    """The name clients ask for; the run's name without it."""
    engine: EngineName = "auto"
    """native: compiled on the node, for CPUs; torch: anywhere; vllm: hands over to vLLM; auto: native where it can be
    compiled, torch elsewhere."""
    max_slots: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions a replica works on at once."""
    max_kv_cache_mib: Annotated[int, Field(ge=1, le=1_048_576)] = 512
    """Memory of a replica for keys and values, MiB: those of running completions, and of prefixes kept for later ones."""
    kv_cache: KvPrecision = "fp32"
    """Precision of keys and values; int8 keeps 3 to 4 times as many tokens."""
    adapters: dict[ModelName, str] = {}
    """LoRA adapters in PEFT's layout: their folders, by the model name that clients ask for."""
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 32
    """Requests that may wait for a slot of a replica; one more is answered 429."""
    prefill_chunk_tokens: Annotated[int, Field(ge=1, le=65536)] = 64
    """Prompt tokens fed in one step: smaller keeps running streams smooth, larger starts new ones sooner."""
    stream_interval_ms: Annotated[int, Field(ge=0, le=1000)] = 20
    """Text of a stream that is ready is written together, at most once in this many milliseconds."""
    max_body_kib: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Largest request body, KiB."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """A completion that takes longer than this many seconds is given up and its slot is free."""


def demand(config: Config) -> Demand:
    return Demand(config.replicas)


def source_state(config: Config) -> Any:
    return None


def preflight(config: Config, cluster: ClusterConfig) -> None:
    """MachineError when the endpoint cannot listen; UsageError when a replica is to have GPUs it would not use."""
    _device(cluster.roles.serve)
    check_endpoint_address(cluster)


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Starts the replicas and publishes where they answer; they stay up until the cluster session closes."""
    from raymill.cluster import serving
    from raymill.cluster.session import session_folder

    began = time.monotonic()
    preflight(config, cluster.config)
    checkpoint, address, run_folder = inputs["checkpoint"], cluster.config.endpoint, inputs.run_folder
    quantization = _check_checkpoint(config, checkpoint.path)
    ensure_metrics_key(run_folder)
    name, model_name = serving.application_name(run_folder), config.model_name or run_folder.name
    if cluster.address is None:
        _compile(config, cluster.config.roles.serve, inputs.progress)
    cluster.connect()
    serving.check_free(name)
    metrics_folder = session_folder() / f"metrics-{os.urandom(6).hex()}"  # gone with the session, even after kill -9
    cluster.at_close(partial(_stop, name, metrics_folder))
    role = cluster.config.roles.serve
    bound = _bind(config, role, checkpoint.path, run_folder, quantization, metrics_folder)
    serving.deploy(bound, name, config.replicas, address)
    host = "127.0.0.1" if address.host in ("0.0.0.0", "::") else address.host  # noqa: S104 - compared, not bound
    url = f"http://{host}:{address.port}"
    serving.await_health(url)
    took_s = time.monotonic() - began
    endpoint = {"url": f"{url}/v1", "host": host, "port": address.port, "model": model_name}
    endpoint |= {"replicas": config.replicas, "pid": os.getpid()}
    write_atomic(inputs.draft.path / ENDPOINT, json.dumps(endpoint) + "\n")
    figures = {
        **endpoint,
        "slots_per_replica": config.max_slots,
        "quantization": quantization,
        "start_s": round(took_s, 2),
    }
    summary = (
        f"{config.replicas} replica{'s' if config.replicas > 1 else ''} of {model_name} ({quantization}) at {url}/v1, "
        f"{config.max_slots} slots each, up in {took_s:.1f} s"
    )
    return inputs.publish("serve", GIVES, config, summary, figures)


def _compile(config: Config, role: Role, progress: Progress) -> None:
    """The native engine for the replicas of this machine: inside their start it would look as if they hung."""
    from raymill.inference import native

    if config.engine not in ("auto", "native") or _device(role) != "cpu":
        return
    compiling = threading.Thread(target=native.library, daemon=True)
    compiling.start()
    compiling.join(_COMPILES_SILENTLY_S)
    if compiling.is_alive():
        progress.note("compiling the native engine, once on this machine; 10 s or so")
        compiling.join()


def _stop(name: str, metrics_folder: Path) -> None:
    from raymill.cluster import serving

    serving.delete(name)
    shutil.rmtree(metrics_folder, ignore_errors=True)


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

    def __init__(
        self, config: dict[str, Any], checkpoint: str, keys: str, api: dict[str, Any], threads: int, device: Device
    ) -> None:
        Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).mkdir(mode=0o700, parents=True, exist_ok=True)
        from raymill.api.keys import KeyFile
        from raymill.api.routes import ApiSettings, create_app, record_stats
        from raymill.inference.loading import load_engine
        from raymill.telemetry.metrics import Metrics

        settings, metrics = Config(**config), Metrics()
        self._record = partial(record_stats, metrics)
        with _as_read_by(settings.engine, Path(checkpoint)) as folder:
            self._engine, tokenizer = load_engine(
                folder,
                engine=settings.engine,
                device=device,
                threads=threads,
                max_slots=settings.max_slots,
                max_kv_cache_bytes=settings.max_kv_cache_mib * 2**20,
                kv_precision=settings.kv_cache,
                adapters={name: Path(each) for name, each in settings.adapters.items()},
                max_queued=settings.max_queued_requests,
                prefill_chunk_tokens=settings.prefill_chunk_tokens,
                on_stats=self._record,
            )
        _warm_up(self._engine, tokenizer)
        self._app = create_app(self._engine, tokenizer, ApiSettings(**api), KeyFile(Path(keys)), metrics)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not walk it while clients wait

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Asked by Ray Serve; raising has the replica replaced."""
        stats = self._engine.stats()
        self._record(stats)
        if not stats.healthy:
            raise RuntimeError("the engine does not work")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # else it never started, and has said why
            self._engine.close()


@contextmanager
def _as_read_by(engine: EngineName, checkpoint: Path) -> Iterator[Path]:
    """The checkpoint; for vLLM, which reads no quantized one of ours, a copy in its own form while it loads."""
    from raymill.model.files import read_config

    if engine != "vllm" or "quantization" not in read_config(checkpoint):
        yield checkpoint
        return
    from raymill.export.formats import export

    with tempfile.TemporaryDirectory(prefix="raymill-vllm-") as aside:
        yield export(checkpoint, "compressed_tensors", Path(aside) / checkpoint.name).folder


def _warm_up(engine: Engine, tokenizer: Tokenizer) -> None:
    """The first token is made before a client waits for it. MachineError when the engine cannot make one."""
    request = Request("warm-up", (tokenizer.end_id,), 1, Sampling(temperature=0.0))
    last = [event for events in engine.submit(request) for event in events][-1]
    if last.finish_reason == "error":
        engine.close()
        fix = "see the replica's log; `raymill compress` makes the checkpoint anew"
        raise MachineError("the engine cannot make a token of this checkpoint", where="serve", fix=fix)


def _check_checkpoint(config: Config, checkpoint: Path) -> str:
    """Its precision; what a replica would stumble over is said here."""
    from raymill.compression.format import read_quantization
    from raymill.inference.adapters import load_adapter
    from raymill.inference.draws import check_vocabulary
    from raymill.inference.kv_cache import fit_pages
    from raymill.model.files import CONFIG, read_config, read_model_config

    model, vocab_size = read_model_config(checkpoint)
    if config.engine != "vllm":
        check_vocabulary(vocab_size, str(checkpoint / CONFIG))
    quantization = read_quantization(read_config(checkpoint), str(checkpoint / CONFIG))
    fit_pages(model, config.max_slots, config.max_kv_cache_mib * 2**20, config.kv_cache)
    for folder in config.adapters.values():
        load_adapter(Path(folder), model)
    return quantization.method if quantization else "fp32"


def application(args: dict[str, Any]) -> Application:
    """What a KubeRay RayService imports: the newest checkpoint of `run_folder` as a Serve application.

    `serve` and `role` in `args` are the job's and the cluster file's sections. Keys are those of the run.
    """
    config, role, run_folder = Config(**args["serve"]), Role(**args["role"]), Path(args["run_folder"])
    made = newest(run_folder, lambda manifest: manifest.kind == "checkpoint")
    if made is None:
        raise ArtifactError(f"{run_folder} holds no checkpoint", fix="run the job first, then apply the RayService")
    checkpoint = open_artifact(made.path).path  # hashes are checked
    quantization = _check_checkpoint(config, checkpoint)
    ensure_metrics_key(run_folder)
    metrics_folder = Path(tempfile.gettempdir()) / f"raymill-metrics-{os.urandom(6).hex()}"
    return _bind(config, role, checkpoint, run_folder, quantization, metrics_folder)


def _bind(
    config: Config, role: Role, checkpoint: Path, run_folder: Path, quantization: str, metrics_folder: Path
) -> Application:
    """The replicas as Serve is to run them."""
    from raymill.cluster.serving import bind_replicas

    api = {
        "model_name": config.model_name or run_folder.name,
        "quantization": quantization,
        "replicas": config.replicas,
        "max_body_bytes": config.max_body_kib * 1024,
        "request_timeout_s": config.request_timeout_s,
        "stream_interval_ms": config.stream_interval_ms,
    }
    adapters = {name: str(Path(folder).absolute()) for name, folder in config.adapters.items()}
    return bind_replicas(
        Replica,
        {**config.model_dump(mode="json"), "adapters": adapters},
        str(checkpoint.absolute()),
        str((run_folder / API_KEYS).absolute()),
        api,
        role.threads,
        _device(role),
        replicas=config.replicas,
        role=role,
        environment={"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder)},
        # Above what a replica takes: its own queue answers 429 at once, Serve's would let a client wait.
        max_ongoing=config.max_slots + config.max_queued_requests + 1000,
    )


def _device(role: Role) -> Device:
    """Where a replica computes: `cuda` only where its role has a GPU for it."""
    if role.gpus_per_worker > 1:
        raise UsageError(
            f"a replica cannot use {role.gpus_per_worker:g} GPUs",
            where="serve",
            why="it computes on one GPU, or on the CPU",
            fix="set cluster.roles.serve.gpus_per_worker to 1 or 0, and serve.replicas to the number of GPUs",
        )
    return "cuda" if role.gpus_per_worker > 0 else "cpu"
