"""The serve stage: addresses, keys, what is printed, and one real endpoint on Ray with two replicas."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import ValidationError

from raymill.api.keys import KeyFile
from raymill.artifact import Draft
from raymill.cluster.config import ClusterConfig, EndpointAddress, Role, Roles
from raymill.cluster.session import Cluster
from raymill.compression.quantize import quantize_model, save_quantized
from raymill.config import Config
from raymill.errors import ArtifactError, MachineError, UsageError
from raymill.inference import native
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.stages import monitor, serve
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress
from raymill.tokenizer.tokenizer import Tokenizer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def place(port, **changes):
    return ClusterConfig(endpoint=EndpointAddress(port=port), **changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tokenizer = Tokenizer.train([Path(json.__file__).read_text()], 500)
    model = Transformer(ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=96), 500)
    model.initialize(seed=0)
    quantize_model(model.requires_grad_(False))
    draft = Draft(folder / "compress-00000000")
    save_quantized(draft.path, model, tokenizer.end_id)
    tokenizer.save(draft.path / "tokenizer.json")
    return draft.publish("checkpoint", "compress", config=Config(), inputs={}, summary="", figures={})


def test_a_taken_port_is_named_with_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port} on 127.0.0.1 is taken") as refused:
            serve.preflight(serve.Config(), place(port))
        proposed = int(re.search(r"--set cluster\.endpoint\.port=(\d+)", str(refused.value))[1])
        serve.preflight(serve.Config(), place(proposed))
    serve.preflight(serve.Config(), place(port))


def test_an_address_of_another_machine_is_refused_here_but_not_asked_of_another_cluster():
    there = EndpointAddress(host="203.0.113.7", port=8000)
    with pytest.raises(MachineError, match="cannot listen"):
        serve.preflight(serve.Config(), ClusterConfig(endpoint=there))
    serve.preflight(serve.Config(), ClusterConfig(endpoint=there, address="10.0.0.1:6379"))


def test_more_gpus_than_a_replica_uses_are_refused():
    def with_gpus(gpus):
        return place(free_port(), roles=Roles(serve=Role(gpus_per_worker=gpus)))

    serve.preflight(serve.Config(), with_gpus(1))
    with pytest.raises(UsageError, match=r"(?s)cannot use 2 GPUs.*gpus_per_worker"):
        serve.preflight(serve.Config(), with_gpus(2))


def test_the_port_is_checked_before_ray_starts(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = Cluster(place(taken.getsockname()[1]))
        inputs = Inputs({"checkpoint": checkpoint}, Draft(tmp_path / "serve-0"), tmp_path, Progress("serve"))
        with pytest.raises(MachineError, match="is taken"):
            serve.run(serve.Config(), inputs, cluster)
    assert not cluster.connected


def test_a_kv_cache_that_does_not_fit_is_said_before_ray_starts(tmp_path, checkpoint):
    shape = json.loads(checkpoint.file("config.json").read_text())
    draft = Draft(tmp_path / "compress-1")
    (draft.path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 1_000_000}))
    large = draft.publish("checkpoint", "compress", config=Config(), inputs={}, summary="", figures={})
    cluster = Cluster(place(free_port()))
    inputs = Inputs({"checkpoint": large}, Draft(tmp_path / "serve-0"), tmp_path, Progress("serve"))
    with pytest.raises(MachineError, match="max_kv_cache_mib"):
        serve.run(serve.Config(max_kv_cache_mib=100), inputs, cluster)
    assert not cluster.connected


def test_a_vocabulary_too_large_to_draw_from_is_said_before_ray_starts(tmp_path, checkpoint):
    shape = json.loads(checkpoint.file("config.json").read_text())
    draft = Draft(tmp_path / "compress-1")
    (draft.path / "config.json").write_text(json.dumps({**shape, "vocab_size": 2**20}))
    large = draft.publish("checkpoint", "compress", config=Config(), inputs={}, summary="", figures={})
    cluster = Cluster(place(free_port()))
    inputs = Inputs({"checkpoint": large}, Draft(tmp_path / "serve-0"), tmp_path, Progress("serve"))
    with pytest.raises(ArtifactError, match="a vocabulary of 1,048,576 ids is too large"):
        serve.run(serve.Config(), inputs, cluster)
    assert not cluster.connected


def test_a_ray_service_serves_the_newest_checkpoint_of_a_run(checkpoint, tmp_path):
    args = {"run_folder": str(tmp_path), "serve": {"replicas": 3}, "role": {"cpus_per_worker": 2}}
    with pytest.raises(ArtifactError, match="holds no checkpoint"):
        serve.application(args)
    (tmp_path / "compress-00000000").symlink_to(checkpoint.path)
    deployment = serve.application(args)._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.init_args[1] == str(tmp_path / "compress-00000000")
    assert (deployment.init_args[4], deployment.ray_actor_options["num_cpus"]) == (2, 2)
    assert deployment.init_args[3]["quantization"] == "int8"
    assert deployment.init_args[3]["request_timeout_s"] == 600
    assert (deployment.init_args[5], deployment.ray_actor_options["num_gpus"]) == ("cpu", 0)
    args["role"] = {"gpus_per_worker": 0.5}
    deployment = serve.application(args)._bound_deployment
    assert (deployment.init_args[5], deployment.ray_actor_options["num_gpus"]) == ("cuda", 0.5)


def test_a_ray_service_serves_no_checkpoint_that_was_altered(checkpoint, tmp_path):
    copy = tmp_path / "compress-00000000"
    shutil.copytree(checkpoint.path, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        serve.application({"run_folder": str(tmp_path), "serve": {}, "role": {}})


@pytest.mark.parametrize(("engine", "told"), [("vllm", "quantization_config"), ("auto", "quantization")])
def test_each_engine_is_given_the_checkpoint_as_it_reads_it(engine, told, checkpoint, tmp_path, monkeypatch):
    class LoadedError(Exception):
        pass

    def load(folder, **settings):
        given.append(folder)
        assert told in json.loads((folder / "config.json").read_text())
        assert Tokenizer.load(folder / "tokenizer.json").vocab_size == 500
        raise LoadedError

    given = []
    monkeypatch.setattr("raymill.inference.loading.load_engine", load)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    config = serve.Config(engine=engine).model_dump(mode="json")
    with pytest.raises(LoadedError):
        serve.Replica(config, str(checkpoint.path), str(tmp_path / "keys.json"), {}, 1, "cpu")
    assert given[0].exists() == (engine == "auto"), "a copy for vLLM is gone again"


def test_a_key_is_made_once_shown_once_and_can_be_replaced(tmp_path):
    key = serve.new_key(tmp_path)
    assert key.startswith("sk-") and serve.new_key(tmp_path) is None
    serve.forget_keys(tmp_path)
    other = serve.new_key(tmp_path)
    keys = KeyFile(tmp_path / "api_keys.json")
    assert (keys.role_of(key), keys.role_of(other)) == (None, "client")
    serve.forget_keys(tmp_path), serve.forget_keys(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 0},
        {"max_slots": 0},
        {"max_queued_requests": -1},
        {"prefill_chunk_tokens": 0},
        {"max_body_kib": 0},
        {"model_name": ""},
        {"stream_interval_ms": -1},
        {"request_timeout_s": 0},
        {"replica": 2},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        serve.Config(**wrong)


class Neighbour(Cluster):
    """The test session's Ray with an endpoint address of its own."""

    def __init__(self, port: int) -> None:
        super().__init__(place(port))
        self.endings = []

    def connect(self) -> None:
        pass

    def at_close(self, ending) -> None:
        self.endings.append(ending)


@pytest.fixture(scope="module")
def endpoint(cluster, checkpoint, tmp_path_factory):
    """Two live replicas, the run's folder, and what the stage printed for a person."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    session = Neighbour(free_port())
    inputs = Inputs({"checkpoint": checkpoint}, Draft(folder / "serve-00000000"), folder, Progress("serve"))
    made = serve.run(serve.Config(max_slots=4, max_queued_requests=8), inputs, session)
    yield made, folder, serve.usage_lines(made, serve.new_key(folder)), session
    for ending in session.endings:
        ending()
    # Serve's proxy stays until Ray ends; it has nothing behind it any more.
    assert httpx.get(made.figures["url"].removesuffix("v1") + "health").status_code == 404


def test_two_replicas_are_up_and_keys_are_private(endpoint):
    made, folder, lines, _ = endpoint
    assert "2 replicas of tiny (int8) at http://127.0.0.1:" in made.manifest.summary
    assert made.json("endpoint.json")["pid"] == os.getpid()
    for name in ("api_keys.json", "metrics_key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    key = lines[0].removeprefix("API key (shown once): ")
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert key.startswith("sk-") and key.encode() not in everything
    again = serve.usage_lines(made, serve.new_key(folder))
    assert key not in "\n".join(again) and "--new-key" in again[0]


def test_the_curl_line_and_the_snippet_work_as_printed(endpoint, tmp_path):
    _, _, lines, _ = endpoint
    curl = next(line for line in lines if line.startswith("curl "))
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=30, check=True).stdout
    assert json.loads(answer)["usage"]["completion_tokens"] > 0
    snippet = "\n".join(lines[lines.index("from openai import OpenAI") :])
    (tmp_path / "snippet.py").write_text(snippet)
    done = subprocess.run(
        [sys.executable, tmp_path / "snippet.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_openai_clients_stream_and_leave_through_serve(endpoint):
    made, folder, lines, _ = endpoint
    key = lines[0].removeprefix("API key (shown once): ")
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 24}
    talk = [{"role": "user", "content": "def"}]
    with openai.OpenAI(base_url=made.figures["url"], api_key=key, max_retries=0) as client:
        whole = client.completions.create(prompt="def", **asked).choices[0].text
        pieces = client.completions.create(prompt="def", stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in pieces) == whole
        said = client.chat.completions.create(messages=talk, **asked).choices[0].message.content
        chunks = client.chat.completions.create(messages=talk, stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="x", n=99)
        leaving = client.completions.create(model="tiny", prompt="x", max_tokens=250, n=4, stream=True)
        next(iter(leaving))
        leaving.close()
    stranger = openai.OpenAI(base_url=made.figures["url"], api_key="sk-wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    headers = {"Authorization": f"Bearer {(folder / 'metrics_key').read_text()}"}
    deadline, active = time.monotonic() + 5, 1.0
    while active and time.monotonic() < deadline:
        text = httpx.get(made.figures["url"].removesuffix("v1") + "metrics", headers=headers).text
        active = monitor.parse_scrape(text)["raymill_active_slots"]
    assert active == 0


def test_only_the_endpoints_address_listens_for_http(endpoint):
    """Ray's own ports are IPv6's, and ask for its token."""
    made, *_ = endpoint
    if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1":
        assert {address for pid in ours("haproxy") for address in listening(pid)} == {
            ("127.0.0.1", made.figures["port"])
        }
    for replica in ours("ray::ServeReplica"):
        assert all(host == "127.0.0.1" for host, _ in listening(replica))


def test_a_native_replica_never_loads_torch(endpoint):
    replicas = ours("ray::ServeReplica")
    assert len(replicas) == 2
    for replica in replicas:
        loaded = Path(f"/proc/{replica}/maps").read_text()
        assert ("/libtorch" in loaded) == (native.library() is None)
        assert "/llvmlite/" not in loaded


def test_a_full_queue_is_told_through_the_proxy(endpoint):
    made, _, lines, _ = endpoint
    headers = {"Authorization": "Bearer " + lines[0].removeprefix("API key (shown once): ")}
    body = {"model": "tiny", "prompt": "def", "max_tokens": 200, "n": 4}

    def ask(_):
        return httpx.post(f"{made.figures['url']}/completions", json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(ask, range(24))]
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"


def test_a_second_run_does_not_take_the_address_over(endpoint, checkpoint, tmp_path):
    made, _, _, session = endpoint
    inputs = Inputs({"checkpoint": checkpoint}, Draft(tmp_path / "serve-00000000"), tmp_path, Progress("serve"))
    endings = len(session.endings)
    with pytest.raises(MachineError, match="serves run tiny already"):
        serve.run(serve.Config(), inputs, Neighbour(free_port()))
    assert len(session.endings) == endings
    assert httpx.get(made.figures["url"].removesuffix("v1") + "health").status_code == 200


def test_monitor_watches_both_replicas(endpoint, tmp_path):
    made, folder, _, session = endpoint
    inputs = Inputs({"endpoint": made}, Draft(folder / "monitor-00000000"), folder, Progress("monitor"))
    report = monitor.run(monitor.Config(), inputs, session)
    assert report.manifest.summary.startswith("2 of 2 replicas up")
    scrape = json.loads(report.file("health.json").read_text())["scrape"]
    assert (scrape["raymill_replicas_up"], scrape["raymill_replicas_wanted"], scrape["raymill_slots"]) == (2, 2, 8)
    assert scrape['raymill_requests_total{route="/v1/completions",status="200"}'] >= 1
    text = report.file("prometheus.yml").read_text()
    assert str(folder / "metrics_key") in text and (folder / "metrics_key").read_text() not in text


def test_what_a_killed_replica_was_asked_is_asked_elsewhere(endpoint):
    """Where HAProxy still can: a request whose second try meets the dying replica is told to be sent again, or cut off."""
    made, _, lines, _ = endpoint
    if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] != "1":
        pytest.skip("Ray's own proxy loses what a replica was working on")
    headers = {"Authorization": "Bearer " + lines[0].removeprefix("API key (shown once): ")}
    body = {"model": "tiny", "prompt": "def", "max_tokens": 240, "temperature": 0}

    def ask(_):
        with suppress(httpx.RemoteProtocolError):
            return httpx.post(f"{made.figures['url']}/completions", json=body, headers=headers, timeout=60)

    before = ours("ray::ServeReplica")
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(ask, range(8))
        time.sleep(0.05)
        os.kill(before[0], signal.SIGKILL)
        answers = [answer for answer in asked if answer is not None]
    whole = [answer for answer in answers if answer.status_code == 200]
    assert len(whole) > 4, "more than the half that the other replica was asked"
    assert {answer.headers.get("retry-after") for answer in answers if answer not in whole} <= {"1"}
    assert len({answer.json()["choices"][0]["text"] for answer in whole}) == 1
    deadline = time.monotonic() + 30
    while len(set(ours("ray::ServeReplica")) - {before[0]}) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ask(0).status_code == 200


def ours(name):
    """Processes below this one whose command line has that in it."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode()

    def below(pid):
        return pid == os.getpid() or (pid in parents and below(parents[pid]))

    return [pid for pid in names if name in names[pid] and below(pid)]


def listening(pid):
    """IPv4 addresses where it listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(descriptor.readlink()))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        (socket.inet_ntoa(bytes.fromhex(row[1][:8])[::-1]), int(row[1][9:], 16))
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    }
