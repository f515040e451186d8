"""A real HTTP server on loopback over a real engine whose model recites one sentence."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from raymill.api.keys import KeyFile
from raymill.api.routes import ApiSettings, create_app
from raymill.inference.engine import BatchingEngine
from raymill.inference.loading import load_engine
from raymill.inference.step import Chunk, PageTable, StepOutput
from raymill.telemetry.metrics import Metrics
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from raymill.tokenizer.training import SMALLEST_VOCAB

SENTENCE = "the cat sat on the mat. "
TEXT = "A cat, \u732b, sat on the mat; the dog (\u72ac) ran 12 miles. "
CONTEXT = 256
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
    step: Reciter | None
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


@contextmanager
def serving(engine, step, tokenizer: Tokenizer, folder: Path, **settings) -> Iterator[Served]:
    """The API over an engine, on a port of its own."""
    keys = KeyFile(folder / "api_keys.json")
    client_key, metrics_key = keys.create("client"), keys.create("metrics")
    api = ApiSettings(**{"model_name": "tiny", "quantization": "int8", "stream_interval_ms": 5, **settings})
    app = create_app(engine, tokenizer, api, keys, Metrics())
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


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    step = Reciter(tokenizer)
    engine = BatchingEngine(step, lambda: StreamDecoder(tokenizer), num_slots=4, max_queued=4, max_step_tokens=32)
    limits = {"max_body_bytes": 64 * 1024, "body_timeout_s": 1.0, "request_timeout_s": 4.0}
    with serving(engine, step, tokenizer, tmp_path_factory.mktemp("keys"), **limits) as served:
        yield served


@pytest.fixture(scope="module")
def roomy(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same with room for long prompts and large bodies."""
    step = Reciter(tokenizer)
    step.num_pages, step.max_seq_len = 256, 1024
    engine = BatchingEngine(step, lambda: StreamDecoder(tokenizer), num_slots=8, max_queued=64, max_step_tokens=256)
    with serving(engine, step, tokenizer, tmp_path_factory.mktemp("keys"), max_body_bytes=2**23) as served:
        yield served


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), 300)


@pytest.fixture(scope="session")
def letters_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose every byte is an id: wherever its text is cut, the ids are the same."""
    return write_model(tmp_path_factory.mktemp("letters"), SMALLEST_VOCAB)


def write_model(folder: Path, vocab_size: int) -> Path:
    """A real model with an adapter beside it; its text is chance, and always the same."""
    import torch
    from safetensors.torch import save_file

    from raymill.model.config import InitConfig, ModelConfig
    from raymill.model.transformer import Transformer
    from raymill.model.weights import save_model

    tokenizer = Tokenizer.train([TEXT] * 20, vocab_size)
    shape = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96}
    model = Transformer(ModelConfig(**shape, max_seq_len=CONTEXT), tokenizer.vocab_size)
    model.initialize(seed=0, init=InitConfig(std=0.2))
    save_model(folder, model, tokenizer.end_id)
    tokenizer.save(folder / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for target in ("q_proj", "o_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{target}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def real(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_model(checkpoint, tmp_path_factory.mktemp("keys")) as served:
        yield served


@pytest.fixture(scope="module")
def letters(letters_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_model(letters_checkpoint, tmp_path_factory.mktemp("keys")) as served:
        yield served


@contextmanager
def serving_model(checkpoint: Path, folder: Path) -> Iterator[Served]:
    engine, tokenizer = load_engine(
        checkpoint,
        max_slots=4,
        max_kv_cache_bytes=2**25,
        max_queued=4,
        prefill_chunk_tokens=32,
        adapters={"tuned": checkpoint / "adapter"},
    )
    with serving(engine, None, tokenizer, folder) as served:
        yield served


@pytest.fixture(autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts with a quick, whole model and must leave every slot free."""
    yield
    for name in {"served", "roomy", "real", "letters"} & set(request.fixturenames):
        served = request.getfixturevalue(name)
        if served.step is not None:
            served.step.pause_s, served.step.broken = 0.0, False
        assert served.settled()
