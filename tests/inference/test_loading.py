import functools
import json

import pytest
import torch

from raymill.compression.quantize import quantize_model, save_quantized
from raymill.errors import ArtifactError, MachineError
from raymill.inference import native
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


def text_on(device, checkpoint, **settings):
    engine, tokenizer = load_engine(checkpoint, device=device, **LIMITS, **settings)
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


@pytest.mark.parametrize("kv_precision", ["fp32", "int8"])
def test_the_native_and_the_torch_step_write_the_same(checkpoint, kv_precision):
    if native.library() is None:
        pytest.skip("no C++ compiler")
    texts = [text_on("cpu", checkpoint, engine=name, kv_precision=kv_precision) for name in ("auto", "native", "torch")]
    assert texts[0] == texts[1] == texts[2]


def test_without_a_compiler_torch_serves_and_native_says_what_to_install(
    checkpoint, monkeypatch, caplog, tmp_path_factory
):
    expected = text_on("cpu", checkpoint, engine="torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level("WARNING"):
        assert text_on("cpu", checkpoint) == text_on("cpu", checkpoint) == expected
    said = [record for record in caplog.records if "compiler" in record.getMessage()]
    assert len(said) == 1 and "install a C++ compiler" in said[0].getMessage()
    with pytest.raises(MachineError, match=r"install g\+\+ or clang"):
        load_engine(checkpoint, engine="native", **LIMITS)


def test_native_is_not_for_a_gpu(checkpoint):
    with pytest.raises(MachineError, match=r"set serve\.engine to torch"):
        load_engine(checkpoint, engine="native", device="cuda", **LIMITS)


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    Tokenizer.train([f"{n} words of many kinds {n * 7919}" for n in range(900)], 500).save(
        checkpoint / "tokenizer.json"
    )
    with pytest.raises(ArtifactError, match="does not match the model"):
        load_engine(checkpoint, **LIMITS)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_ids_that_only_the_model_knows_are_read_and_say_nothing(tmp_path, tokenizer, name):
    """Vocabularies are padded to round numbers: 8 ids more than the tokenizer has."""
    model = Transformer(ModelConfig(**SHAPE), tokenizer.vocab_size + 8)
    model.initialize(seed=0, init=InitConfig(std=0.1))
    save_model(tmp_path, model, tokenizer.end_id)
    tokenizer.save(tmp_path / "tokenizer.json")
    engine, _ = load_engine(tmp_path, engine=name, **LIMITS)
    known, unknown = tokenizer.encode("the cat"), tokenizer.vocab_size + 3
    only = Sampling(temperature=0, logit_bias=((unknown, 100.0),))
    drawn = Sampling(temperature=1.0, seed=1, logit_bias=tuple((unknown + n, 3.0) for n in range(-3, 5)))
    made = {}
    for each, prompt, sampling in (("only", known, only), ("drawn", known, drawn), ("fed", [unknown, *known], drawn)):
        request = Request(each, tuple(prompt), 8, sampling, logprobs=20, prompt_logprobs=20, stop=("never",))
        made[each] = [event for batch in engine.submit(request) for event in batch]
    assert [event.finish_reason for event in made["only"]] == [None] * 7 + ["length"]
    assert [event.token.token for event in made["only"]] == [unknown] * 8
    assert "".join(event.text for event in made["only"]) == ""
    for each in ("drawn", "fed"):
        ids = [event.token.token for event in made[each]]
        assert made[each][-1].finish_reason == "length" and max(ids) >= tokenizer.vocab_size > min(ids)
        assert "".join(event.text for event in made[each]) == tokenizer.decode(ids)
    engine.close()


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_schema_never_lets_in_what_only_the_model_knows(tmp_path, tokenizer, name):
    grammars = pytest.importorskip("raymill.inference.grammar").Grammars
    pytest.importorskip("llguidance")
    model = Transformer(ModelConfig(**SHAPE), tokenizer.vocab_size + 40)  # more than a word of the mask
    model.initialize(seed=0, init=InitConfig(std=0.1))
    save_model(tmp_path, model, tokenizer.end_id)
    tokenizer.save(tmp_path / "tokenizer.json")
    engine, _ = load_engine(tmp_path, engine=name, **LIMITS)
    wanted = Sampling(temperature=0, logit_bias=tuple((tokenizer.vocab_size + n, 100.0) for n in range(40)))
    request = Request("r", (1,), 20, wanted, grammar=grammars(tokenizer).json_schema({"enum": ["the cat"]}),
                      stop_ids=frozenset({tokenizer.end_id}))  # fmt: skip
    events = [event for batch in engine.submit(request) for event in batch]
    assert "".join(event.text for event in events) == '"the cat"' and events[-1].finish_reason == "stop"
    engine.close()


def test_a_vocabulary_too_large_to_draw_from_is_said_before_weights_are_read(checkpoint):
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    (checkpoint / "model.safetensors").unlink()
    path.write_text(json.dumps({**values, "vocab_size": 2**20}))
    with pytest.raises(ArtifactError, match="a vocabulary of 1,048,576 ids is too large"):
        load_engine(checkpoint, **LIMITS)
    path.write_text(json.dumps({**values, "vocab_size": 2**20 - 1}))
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        load_engine(checkpoint, **LIMITS)


def test_a_cache_too_small_for_one_sequence_says_how_much_it_needs(checkpoint):
    with pytest.raises(MachineError, match="max_kv_cache_mib to at least 1"):
        load_engine(checkpoint, **{**LIMITS, "max_kv_cache_bytes": 2**12})


def test_slots_beyond_the_memory_are_open_to_short_requests(checkpoint):
    engine, _ = load_engine(checkpoint, **{**LIMITS, "max_slots": 6, "max_kv_cache_bytes": 2**16})
    assert engine.stats().num_slots == 6
    streams = [engine.submit(Request(str(n), (n,), 20, Sampling(temperature=0))) for n in range(6)]
    assert [[e for batch in stream for e in batch][-1].finish_reason for stream in streams] == ["length"] * 6
    engine.close()


@pytest.mark.gpu
def test_a_gpu_says_the_same(checkpoint):
    assert text_on("cuda", checkpoint) == text_on("cpu", checkpoint)
