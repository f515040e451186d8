"""A real HTTP server on loopback over a real engine whose model recites one sentence."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from raymill.api.keys import KeyFile
from raymill.api.routes import ApiSettings, create_app
from raymill.inference.engine import BatchingEngine
from raymill.inference.step import Chunk, PageTable, StepOutput
from raymill.telemetry.metrics import Metrics
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer

SENTENCE = "the cat sat on the mat. "
_PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""httpx would read every root certificate for each client."""


class Reciter:
    """The token at position p is the p-th of SENTENCE, again and again; `pause_s` slows it, `broken` makes it fail."""

    num_pages, max_seq_len = 16, 128

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.script = tokenizer.encode(SENTENCE)
        self.pause_s = 0.0
        self.broken = False

    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> StepOutput:
        time.sleep(self.pause_s * max(chunk.num_logits for chunk in chunks))  # a drafted token takes its time too
        if self.broken:
            raise RuntimeError("broken on purpose")
        ends = [(chunk.start + len(chunk.ids), chunk.num_logits) for chunk in chunks]
        wanted = [position for end, rows in ends for position in range(end - rows + 1, end + 1)]
        logits = np.zeros((len(wanted), self.vocab_size), np.float32)
        for row, position in enumerate(wanted):
            logits[row, self.script[position % len(self.script)]] = 30.0
        if not any(chunk.wants_hidden for chunk in chunks):
            return StepOutput(logits)
        read = [chunk.ids for chunk in chunks if chunk.wants_hidden]
        return StepOutput(
            logits, np.concatenate([np.eye(self.vocab_size, 8, dtype=np.float32)[list(ids)] for ids in read])
        )


@dataclass
class Served:
    url: str
    engine: BatchingEngine
    step: Reciter
    keys: KeyFile
    client_key: str
    metrics_key: str
    tokenizer: Tokenizer

    def http(self, key: str | None = None, **options) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.client_key if key is None else key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=_PLAIN, **options)

    def settled(self) -> bool:
        """Whether every slot becomes free within 2 s."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if stats.active == stats.queued == 0:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SENTENCE] * 20, 300)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    step = Reciter(tokenizer)
    engine = BatchingEngine(step, lambda: StreamDecoder(tokenizer), num_slots=4, max_queued=4, max_step_tokens=32)
    keys = KeyFile(Path(tmp_path_factory.mktemp("keys")) / "api_keys.json")
    client_key, metrics_key = keys.create("client"), keys.create("metrics")
    settings = ApiSettings(
        model_name="tiny",
        quantization="int8",
        max_body_bytes=64 * 1024,
        stream_interval_ms=5,
        body_timeout_s=1.0,
        request_timeout_s=4.0,
    )
    app = create_app(engine, tokenizer, settings, keys, Metrics())
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield Served(url, engine, step, keys, client_key, metrics_key, tokenizer)
    server.should_exit = True
    thread.join(10)
    engine.close()


@pytest.fixture(autouse=True)
def restored(served: Served) -> Iterator[None]:
    """Every test starts with a quick, whole model and must leave every slot free."""
    yield
    served.step.pause_s, served.step.broken = 0.0, False
    assert served.settled()
