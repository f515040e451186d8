"""The backend against vLLM itself, on a CPU, beside our own engine. A minute; skips where vLLM is not installed.

Its Python need not have all of ours: `python -m pytest --noconftest tests/inference/test_vllm_itself.py` needs no Ray.
"""

import json
import multiprocessing

import numpy as np
import pytest

pytest.importorskip("vllm")

from safetensors.numpy import save_file

from raymill.compression.quantize import quantize_model, save_quantized
from raymill.errors import ArtifactError, MachineError, RequestError
from raymill.export.formats import export
from raymill.inference.loading import load_engine
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.model.config import InitConfig, ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # those of vLLM's own making
LIMITS = {"max_slots": 4, "max_kv_cache_bytes": 2**24, "max_queued": 60, "prefill_chunk_tokens": 32}
GREEDY = Sampling(temperature=0.0)
TEXTS = [
    "The quick brown fox jumps over the lazy dog; it doesn't stop at 1234567 fences.",
    "Gr\u00fc\u00dfe aus K\u00f6ln",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, the same in int8 as ours and as exported, and an adapter."""
    root, tokenizer = tmp_path_factory.mktemp("models"), Tokenizer.train(TEXTS * 3, 350)
    shape = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden_dim": 96}
    model = Transformer(ModelConfig(**shape, max_seq_len=64), tokenizer.vocab_size)
    model.initialize(seed=1, init=InitConfig(std=0.3))
    for name in ("whole", "int8", "tuned"):
        (root / name).mkdir()
    save_model(root / "whole", model, tokenizer.end_id)
    quantize_model(model.requires_grad_(False))
    save_quantized(root / "int8", model, tokenizer.end_id)
    for name in ("whole", "int8"):
        tokenizer.save(root / name / "tokenizer.json")
    export(root / "int8", "compressed_tensors", root / "w8a8")
    random = np.random.default_rng(0)
    tensors = {}
    for matrix, (outputs, inputs) in {"self_attn.q_proj": (128, 64), "mlp.down_proj": (64, 96)}.items():
        name = f"base_model.model.model.layers.1.{matrix}.lora_"
        tensors[f"{name}A.weight"] = random.normal(0, 0.2, (9, inputs)).astype(np.float32)
        tensors[f"{name}B.weight"] = random.normal(0, 0.2, (outputs, 9)).astype(np.float32)
    save_file(tensors, root / "tuned" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 9, "lora_alpha": 18, "target_modules": ["q_proj", "down_proj"]}
    (root / "tuned" / "adapter_config.json").write_text(json.dumps(settings))
    return root


@pytest.fixture(scope="module")
def engines(folders):
    """vLLM's and ours, of one model and its adapter."""
    adapters = {"tuned": folders / "tuned"}
    made = [load_engine(folders / "whole", engine=name, adapters=adapters, **LIMITS)[0] for name in ("vllm", "torch")]
    yield made
    for engine in made:
        engine.close()


def prompts(count=12):
    random = np.random.default_rng(1)
    return [tuple(map(int, random.integers(1, 300, size))) for size in random.integers(1, 30, count)]


def ask(engine, wanted):
    """The events of requests that are all asked at once."""
    streams = [
        engine.submit(Request(**{"id": str(n), "max_tokens": 24, "sampling": GREEDY, **each}))
        for n, each in enumerate(wanted)
    ]
    return [[event for batch in stream for event in batch] for stream in streams]


def texts(answers):
    return [("".join(event.text for event in events), events[-1].finish_reason, len(events)) for events in answers]


def scores(answers):
    """Of every token, those of the prompts too."""
    tokens = [
        each for events in answers for event in events for each in [*(event.prompt or ())[1:], event.token] if each
    ]
    return [each.token for each in tokens], np.array([each.logprob for each in tokens])


def test_greedy_text_and_log_probabilities_are_ours(engines):
    wanted = [{"prompt_ids": ids, "logprobs": 2} for ids in prompts()]
    wanted += [{"prompt_ids": ids, "stop_ids": frozenset(range(200))} for ids in prompts()]
    penalties = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": ((5, 3.0),),
    }
    wanted += [{"prompt_ids": ids, "sampling": Sampling(temperature=0.0, **penalties)} for ids in prompts()]
    found, expected = (ask(engine, wanted) for engine in engines)
    assert texts(found) == texts(expected) and len(set(texts(found))) > 20
    assert {events[-1].finish_reason for events in found} == {"stop", "length"}
    (tokens, logprobs), (our_tokens, our_logprobs) = scores(found), scores(expected)
    assert tokens == our_tokens and np.abs(logprobs - our_logprobs).max() < 1e-3
    shown = texts(found)[0][0]
    stop = {"prompt_ids": prompts()[0], "stop": (shown[5:7],)}
    assert texts(ask(engines[0], [stop])) == texts(ask(engines[1], [stop])) != texts(found[:1])


def test_seeds_repeat_in_any_batch(engines):
    drawn = Sampling(temperature=1.0, top_p=0.95, top_k=50, min_p=0.01, seed=-4)
    wanted = [{"prompt_ids": ids, "sampling": drawn} for ids in prompts()]
    together = texts(ask(engines[0], wanted))
    assert together == [texts(ask(engines[0], [each]))[0] for each in wanted]
    others = [{"prompt_ids": ids, "sampling": Sampling(temperature=1.0, seed=5)} for ids in prompts()]
    assert not set(together) & set(texts(ask(engines[0], others)))
    likeliest = [{"prompt_ids": ids, "sampling": Sampling(top_p=0.0)} for ids in prompts()]
    assert texts(ask(engines[0], likeliest)) == texts(ask(engines[1], likeliest))


def test_an_adapter_and_its_base_share_a_batch(engines):
    wanted = [{"prompt_ids": ids, "adapter": name} for ids in prompts() for name in (None, "tuned")]
    found = texts(ask(engines[0], wanted))
    assert found == texts(ask(engines[1], wanted))
    assert not set(found[::2]) & set(found[1::2])


def test_aborts_and_wrong_requests(engines):
    engine = engines[0]
    for _ in range(30):
        stream = engine.submit(Request("gone", (5, 6), 60, GREEDY))
        engine.abort("gone")
        assert [event for batch in stream for event in batch][-1].finish_reason == "abort"
    stream = engine.submit(Request("later", (5, 6), 60, GREEDY))
    batches = iter(stream)
    next(batches)
    engine.abort("later")
    assert [event for batch in batches for event in batch][-1].finish_reason == "abort"
    with pytest.raises(RequestError, match="scores no prompts where it has adapters"):
        ask(engine, [{"prompt_ids": (1, 2), "prompt_logprobs": 1}])
    for wrong in ({"prompt_ids": (1,) * 60}, {"prompt_ids": (9999,)}, {"prompt_ids": (1,), "adapter": "none"}):
        with pytest.raises(RequestError):
            ask(engine, [wrong])
    assert engine.stats().active == 0 and engine.stats().healthy


def test_an_exported_int8_model_is_as_near_as_rounding_leaves_it_and_close_ends_everything(folders):
    before = set(multiprocessing.active_children())
    theirs, ours = (load_engine(folders / f, engine=e, **LIMITS)[0] for f, e in (("w8a8", "vllm"), ("int8", "torch")))
    wanted = [{"prompt_ids": ids, "max_tokens": 0, "prompt_logprobs": 1} for ids in (*prompts(), (7,) * 64)]
    (_, found), (_, expected) = (scores(ask(engine, wanted)) for engine in (theirs, ours))
    assert np.abs(found - expected).max() < 0.5 and np.abs(found - expected).mean() < 0.05
    (process,) = set(multiprocessing.active_children()) - before
    stream = theirs.submit(Request("open", (5, 6), 60, GREEDY))
    theirs.close(), ours.close()
    assert [event for batch in stream for event in batch][-1].finish_reason == "abort"
    process.join(timeout=10)
    assert not process.is_alive() and not theirs.stats().healthy
    with pytest.raises(RequestError):
        theirs.submit(Request("late", (5, 6), 60, GREEDY))


def test_what_it_cannot_compute_ends_the_start(folders, tmp_path):
    model = Transformer(ModelConfig(num_layers=1, model_dim=32, num_heads=4, hidden_dim=64, max_seq_len=64), 350)
    model.initialize(seed=0)
    save_model(tmp_path, model, 0)  # heads of 8
    (tmp_path / "tokenizer.json").write_bytes((folders / "int8" / "tokenizer.json").read_bytes())
    with pytest.raises(MachineError, match="vLLM cannot serve"):
        load_engine(tmp_path, engine="vllm", **LIMITS)
    with pytest.raises(ArtifactError, match="raymill export"):
        load_engine(folders / "int8", engine="vllm", **LIMITS)
