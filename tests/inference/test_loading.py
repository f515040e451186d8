import pytest
import torch

from raymill.compression.quantize import quantize_model, save_quantized
from raymill.errors import MachineError
from raymill.inference.loading import load_engine
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.model.config import InitConfig, ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.tokenizer.tokenizer import Tokenizer

LIMITS = {"max_slots": 2, "max_kv_cache_bytes": 2**24, "max_queued": 2, "prefill_chunk_tokens": 8}


SHAPE = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 32}


def a_model(**settings):
    model = Transformer(ModelConfig(**{**SHAPE, **settings}), 300)
    model.initialize(seed=0, init=InitConfig(std=0.1))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat"] * 20, 300)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    model = a_model()
    quantize_model(model.requires_grad_(False))
    save_quantized(tmp_path, model, tokenizer.end_id)
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path


def text_on(device, checkpoint):
    engine, tokenizer = load_engine(checkpoint, device=device, **LIMITS)
    try:
        stream = engine.submit(Request("r", tuple(tokenizer.encode("the cat")), 8, Sampling(temperature=0)))
        events = [event for batch in stream for event in batch]
        return "".join(event.text for event in events), events[-1].finish_reason
    finally:
        engine.close()


def test_a_checkpoint_runs_on_the_cpu_and_cuda_is_not_asked_for(checkpoint, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    assert text_on("cpu", checkpoint)[1] == "length"


@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "llama", "tie_embeddings": False},
        {"architecture": "mistral", "sliding_window": 3},
        {"architecture": "qwen2"},
        {"architecture": "qwen3"},
        {"architecture": "gpt2", "num_kv_heads": 4},
    ],
    ids=lambda settings: settings["architecture"],
)
def test_the_engine_writes_what_the_model_would(tmp_path, tokenizer, settings):
    model = a_model(**settings)
    save_model(tmp_path, model, tokenizer.end_id)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = list(tokenizer.encode("the cat"))
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert text_on("cpu", tmp_path) == (tokenizer.decode(ids[prompt:]), "length")


def test_a_replica_without_its_gpu_says_what_to_set(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="gpus_per_worker to 0"):
        load_engine(checkpoint, device="cuda", **LIMITS)


@pytest.mark.gpu
def test_a_gpu_says_the_same(checkpoint):
    assert text_on("cuda", checkpoint) == text_on("cpu", checkpoint)
