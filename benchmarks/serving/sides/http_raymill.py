"""The same completions by three ways: `--variant engine` in this process, `uvicorn` and `serve` (Ray Serve) over HTTP.

A turn: 8 and then 32 clients, each asks again as soon as it was answered, `--requests` times; then one client alone, for
the time to its first token. Prompts are random ids, none used twice.

Seconds are the clock's; with one thread those of CPU of every process from here down, clients, servers and Ray among them.
"""

import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from http_client import Answer, Client

CLIENTS = (8, 32)
_SLOTS = 32
_PROMPT_TOKENS, _NEW_TOKENS = 64, 64
Complete = Callable[[list[int], int], Coroutine[Any, Any, Answer]]


def main() -> None:
    options = _options()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    with ExitStack() as stack:
        one_turn = {"engine": _engine, "uvicorn": _uvicorn, "serve": _serve}[options.variant](options, stack)
        asyncio.run(one_turn())
        say({})
        while sys.stdin.readline():
            say(asyncio.run(one_turn()))
    say({})


def _engine(options: Namespace, stack: ExitStack) -> Callable[[], Coroutine[Any, Any, dict[str, float]]]:
    from raymill.inference.loading import load_engine
    from raymill.inference.requests import Request
    from raymill.inference.sampling import Sampling
    from raymill.stages.serve import Config

    config = Config(replicas=1, max_slots=_SLOTS)
    engine, tokenizer = load_engine(
        options.model,
        threads=options.threads,
        max_slots=_SLOTS,
        max_kv_cache_bytes=config.max_kv_cache_mib * 2**20,
        max_queued=config.max_queued_requests,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
    )
    stack.callback(engine.close)
    numbers = itertools.count()

    async def complete(ids: list[int], max_tokens: int) -> Answer:
        began, tokens, first_s = time.perf_counter(), 0, 0.0
        stops = frozenset({tokenizer.end_id})
        asked = Request(str(next(numbers)), tuple(ids), max_tokens, Sampling(temperature=0.0), stop_ids=stops)
        async for batch in engine.submit(asked).batches(config.stream_interval_ms / 1000):
            first_s = first_s or time.perf_counter() - began
            tokens += sum(event.counts for event in batch)
        return Answer(tokens, first_s)

    async def one_turn() -> dict[str, float]:
        return await _turn(options, [complete] * max(CLIENTS))

    return one_turn


def _uvicorn(options: Namespace, stack: ExitStack) -> Callable[[], Coroutine[Any, Any, dict[str, float]]]:
    from raymill.api.keys import KeyFile

    options.folder.mkdir(exist_ok=True)
    key, port = KeyFile(options.folder / "keys.json").create("client"), _free_port()
    settings = {
        "model": options.model,
        "folder": options.folder,
        "port": port,
        "slots": _SLOTS,
        "threads": options.threads,
    }
    script = str(Path(__file__).with_name("http_server.py"))
    command = [
        sys.executable,
        script,
        *(part for name, value in settings.items() for part in (f"--{name}", str(value))),
    ]
    server = subprocess.Popen(command, stdin=subprocess.PIPE)
    stack.callback(server.wait)
    assert server.stdin is not None
    stack.callback(server.stdin.close)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return _over_http(options, port, key)
        time.sleep(0.1)
    raise RuntimeError("uvicorn did not start")


def _serve(options: Namespace, stack: ExitStack) -> Callable[[], Coroutine[Any, Any, dict[str, float]]]:
    """The serve stage as a job runs it, on the checkpoint as a run's artifact."""
    from raymill.artifact import Draft
    from raymill.cluster.config import ClusterConfig, EndpointAddress, Role, Roles
    from raymill.cluster.session import Cluster
    from raymill.config import Config
    from raymill.stages import serve
    from raymill.stages.contract import Inputs
    from raymill.telemetry.progress import Progress

    run = options.folder / "benchmark"
    run.mkdir(parents=True, exist_ok=True)
    made = Draft(run / "compress-00000000")
    for file in options.model.iterdir():
        os.link(file, made.path / file.name)
    checkpoint = made.publish("checkpoint", "compress", config=Config(), inputs={}, summary="", figures={})
    key, port = serve.new_key(run), _free_port()
    role = Role(cpus_per_worker=options.threads)
    place = ClusterConfig(endpoint=EndpointAddress(port=port), roles=Roles(serve=role), storage=str(options.folder))
    cluster = stack.enter_context(Cluster(place))
    inputs = Inputs({"checkpoint": checkpoint}, Draft(run / "serve-00000000"), run, Progress("serve"))
    serve.run(serve.Config(replicas=1, max_slots=_SLOTS), inputs, cluster)
    assert key is not None
    return _over_http(options, port, key)


def _over_http(options: Namespace, port: int, key: str) -> Callable[[], Coroutine[Any, Any, dict[str, float]]]:
    async def one_turn() -> dict[str, float]:
        clients = [Client(port, key) for _ in range(max(CLIENTS))]
        for client in clients:
            await client.__aenter__()
        try:
            return await _turn(options, [client.complete for client in clients])
        finally:
            for client in clients:
                await client.__aexit__()

    return one_turn


async def _turn(options: Namespace, ways: list[Complete]) -> dict[str, float]:
    now = time.perf_counter if options.threads > 1 else _cpu_s_of_all
    found = {}
    for count in CLIENTS:
        began = now()
        counts = await asyncio.gather(*(_ask(way, options.requests) for way in ways[:count]))
        found[str(count)] = sum(counts) / (now() - began)
    firsts = []
    for _ in range(options.firsts):
        await asyncio.sleep(0.01)  # idle
        firsts.append((await ways[0](_prompt(), 2)).first_s)
    return found | {"first_ms": 1e3 * statistics.median(firsts)}


async def _ask(way: Complete, requests: int) -> int:
    return sum([(await way(_prompt(), _NEW_TOKENS)).tokens for _ in range(requests)])


def _cpu_s_of_all() -> float:
    """CPU seconds of this process and its descendants so far, to 10 ms."""
    parents, took_s = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                took_s[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, some = 0.0, {os.getpid()}
    while some:
        found += sum(took_s[each] for each in some)
        some = {each for each, parent in parents.items() if parent in some}
    return found


def _prompt() -> list[int]:
    return [random.randrange(300, 8000) for _ in range(_PROMPT_TOKENS)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _options() -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--firsts", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    main()
