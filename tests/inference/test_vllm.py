"""The backend against a fake of vLLM's shape; test_vllm_itself.py has vLLM itself."""

import asyncio
import json
import os
import shutil
import sys
import types
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pytest

from raymill.errors import ArtifactError, MachineError, RequestError
from raymill.inference.loading import load_engine
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.tokenizer.tokenizer import Tokenizer

LIMITS = {"max_slots": 2, "max_kv_cache_bytes": 2**24, "max_queued": 1, "prefill_chunk_tokens": 8}
SCRIPT = "the cat sat on the mat"


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


@dataclass
class Part:
    token_ids: list
    logprobs: list | None
    finish_reason: str | None = None


@dataclass
class Output:
    outputs: list
    prompt_logprobs: list | None = None
    finished: bool = False


class FakeEngine:
    """Recites SCRIPT's ids, two at a time, and remembers what it was asked."""

    made = None

    def __init__(self, args):
        self.args, self.asked, self.dropped, self.errored, self.down = args, [], [], False, False
        self.script, self.wait, self.fail, self.reader = [5], None, None, None
        FakeEngine.made = self

    @classmethod
    def from_engine_args(cls, args):
        return cls(args)

    async def generate(self, prompt, sampling_params, request_id, lora_request=None):
        if self.reader is None:  # vLLM reads its processes' answers in the caller's loop, for ever
            self.reader = asyncio.get_running_loop().create_task(asyncio.Event().wait())
        if request_id != "first":
            self.asked.append((prompt, sampling_params, request_id, lora_request))
        try:
            if self.fail == request_id:
                raise RuntimeError("out of memory")
            params = sampling_params.settings
            scores = None
            if params["prompt_logprobs"] is not None:
                scores = [None, *({token: Logprob(-1.0), 7: Logprob(-0.5)} for token in prompt["prompt_token_ids"][1:])]
            for at in range(0, params["max_tokens"], 2):
                if self.wait:
                    await self.wait.wait()
                ids = [self.script[n % len(self.script)] for n in range(at, min(at + 2, params["max_tokens"]))]
                found = [{token: Logprob(-0.25), 3: Logprob(-2.0)} for token in ids]
                yield Output([Part(ids, found if params["logprobs"] is not None else None)], scores)
                scores = None
                await asyncio.sleep(0)
        finally:
            self.dropped.append(request_id)

    async def add_lora(self, lora):
        if "refused" in lora[0]:
            raise ValueError("no such layer")
        return True

    def shutdown(self):
        assert self.reader is None or self.reader.cancelled(), "it complains of processes that ended under it"
        self.down = True


@dataclass
class Settings:
    settings: dict = field(default_factory=dict)


@pytest.fixture
def vllm(monkeypatch):
    class Kind(Enum):
        DELTA = 1

    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    arguments = lambda **settings: Settings(settings)  # noqa: E731
    module("vllm", AsyncEngineArgs=arguments, AsyncLLMEngine=FakeEngine, SamplingParams=arguments, __version__="0.32.0")
    module("vllm.platforms", current_platform=types.SimpleNamespace(device_type="cpu"))
    for name in (
        "VLLM_NO_USAGE_STATS",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    module("vllm.sampling_params", RequestOutputKind=Kind)
    module("vllm.inputs", TokensPrompt=dict)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=lambda *values: values)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), Tokenizer.train([SCRIPT] * 20, 300)
    shape = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 64, "max_seq_len": 64}
    model = Transformer(ModelConfig(**shape), 300)
    model.initialize(seed=0)
    save_model(folder, model, tokenizer.end_id)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def engine(vllm, checkpoint):
    engine, tokenizer = load_engine(checkpoint, engine="vllm", **LIMITS)
    FakeEngine.made.script = tokenizer.encode(SCRIPT)
    yield engine
    engine.close()


def request(name="r", max_tokens=30, **changes):
    return Request(**{"id": name, "prompt_ids": (5, 6, 7), "max_tokens": max_tokens, "sampling": Sampling(), **changes})


def read(stream):
    events = [event for batch in stream for event in batch]
    return "".join(event.text for event in events), events[-1].finish_reason, len(events)


def test_settings_go_over_in_vllms_words_and_ids_come_back_as_text(engine, checkpoint):
    sampling = Sampling(
        temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=-3, logit_bias=((9, 2.0),), presence_penalty=1
    )
    count = len(FakeEngine.made.script)
    assert read(engine.submit(request(max_tokens=count, sampling=sampling, stop_ids=frozenset({0})))) == (
        SCRIPT,
        "length",
        count,
    )
    ((prompt, params, name, lora),) = FakeEngine.made.asked
    assert prompt == {"prompt_token_ids": [5, 6, 7]} and name == "r" and lora is None
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "presence_penalty": 1, "logit_bias": {9: 2.0}}
    wanted |= {"seed": 2**63 - 3, "max_tokens": count, "stop_token_ids": [0], "detokenize": False, "ignore_eos": True}
    assert wanted.items() <= params.settings.items()
    args = FakeEngine.made.args.settings
    assert (args["model"], args["max_model_len"], args["max_num_seqs"]) == (str(checkpoint), 65, 2)
    assert (args["kv_cache_memory_bytes"], args["dtype"]) == (2**24, "float32")
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["OMP_NUM_THREADS"] == "1"


def test_stop_strings_end_it_here_and_vllm_is_told_to_drop_it(engine):
    assert read(engine.submit(request(stop=("sat",))))[:2] == ("the cat ", "stop")
    assert FakeEngine.made.dropped == ["first", "r"]


def test_a_stop_id_is_counted_and_not_shown(engine):
    script = FakeEngine.made.script
    text, reason, count = read(engine.submit(request(stop_ids=frozenset({script[3]}))))
    assert (reason, count) == ("stop", 4) and SCRIPT.startswith(text)


def test_log_probabilities_of_prompt_and_tokens(engine):
    wanted = request(max_tokens=2, logprobs=1, prompt_logprobs=2)
    first, second = [event for batch in engine.submit(wanted) for event in batch]
    assert [each.token for each in first.prompt] == [5, 6, 7] and first.prompt[0].logprob is None
    assert first.prompt[1].logprob == -1.0 and first.prompt[1].top == ((7, -0.5), (6, -1.0))
    assert second.prompt is None and second.token.top == ((second.token.token, -0.25),)
    (only,) = [e for b in engine.submit(request("s", max_tokens=0, prompt_logprobs=0)) for e in b]
    assert (only.finish_reason, only.counts, len(only.prompt)) == ("length", False, 3)


def test_abort_failure_and_close_end_streams(engine):
    inner = FakeEngine.made
    inner.wait = asyncio.Event()
    streams = [engine.submit(request(str(n))) for n in range(3)]
    with pytest.raises(RequestError) as refused:
        engine.submit(request("4"))
    assert refused.value.status == 429
    assert (engine.stats().active, engine.stats().queued) == (2, 1)
    engine.abort("0"), engine.abort("nobody")
    assert read(streams[0]) == ("", "abort", 1)
    inner.fail = "bad"
    assert read(engine.submit(request("bad"))) == ("", "error", 1)
    engine.close()
    assert [read(stream)[1] for stream in streams[1:]] == ["abort", "abort"]
    assert inner.down and not engine.stats().healthy
    with pytest.raises(RequestError) as refused:
        engine.submit(request("late"))
    assert refused.value.status == 503


def test_a_request_that_is_dropped_before_it_began_ends_too(engine):
    for n in range(200):
        stream = engine.submit(request(str(n)))
        engine.abort(str(n))
        assert read(stream)[1] in ("abort", "length")
    assert engine.stats().active == 0


def test_what_it_cannot_do_is_refused_by_name(engine):
    with pytest.raises(RequestError) as refused:
        engine.submit(request(grammar=object()))
    assert refused.value.field == "response_format"
    with pytest.raises(RequestError, match="no embeddings"):
        engine.embed((1,))
    with pytest.raises(RequestError, match="no adapter"):
        engine.submit(request(adapter="other"))


def test_without_vllm_the_fix_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MachineError, match="pip install vllm"):
        load_engine(checkpoint, engine="vllm", **LIMITS)


def test_our_own_quantized_checkpoint_is_to_be_exported_first(vllm, checkpoint, tmp_path):
    folder = tmp_path / "int8"
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization": {"method": "int8"}}))
    with pytest.raises(ArtifactError, match="raymill export"):
        load_engine(folder, engine="vllm", **LIMITS)


def checkpoint_with(checkpoint, folder, **changes):
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def test_an_exported_folder_is_served_by_vllm_only(vllm, checkpoint, tmp_path):
    folder = checkpoint_with(checkpoint, tmp_path / "w8a8", quantization_config={"quant_method": "compressed-tensors"})
    load_engine(folder, engine="vllm", **LIMITS)[0].close()
    with pytest.raises(ArtifactError, match="quantization_config"):
        load_engine(folder, engine="torch", **LIMITS)


def test_what_vllm_would_compute_otherwise_is_refused(vllm, checkpoint, tmp_path, monkeypatch):
    qwen2 = checkpoint_with(checkpoint, tmp_path / "qwen2", model_type="qwen2", head_dim=32)
    with pytest.raises(ArtifactError, match=r"computes .* wrongly"):
        load_engine(qwen2, engine="vllm", **LIMITS)
    with pytest.raises(MachineError, match=r"serve\.kv_cache to fp32"):
        load_engine(checkpoint, engine="vllm", kv_precision="int8", **LIMITS)
    with pytest.raises(MachineError, match="does not compute on cuda"):
        load_engine(checkpoint, engine="vllm", device="cuda", **LIMITS)
    with pytest.raises(MachineError, match="max_kv_cache_mib"):
        load_engine(checkpoint, engine="vllm", **{**LIMITS, "max_kv_cache_bytes": 2**10})

    def fails(args):
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(FakeEngine, "from_engine_args", fails)
    with pytest.raises(MachineError, match=r"vLLM cannot serve .*\n.*core initialization failed"):
        load_engine(checkpoint, engine="vllm", **LIMITS)


def test_a_prompt_that_fills_the_model_is_scored_where_positions_can_be_stretched(engine, vllm, checkpoint, tmp_path):
    full = request("full", max_tokens=0, prompt_ids=(5,) * 64, prompt_logprobs=0)
    assert read(engine.submit(full))[1] == "length"
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    fixed, _ = load_engine(checkpoint_with(checkpoint, tmp_path / "yarn", rope_scaling=yarn), engine="vllm", **LIMITS)
    with pytest.raises(RequestError, match="scores 63 of this model"):
        fixed.submit(full)
    fixed.close()


def test_adapters_go_over_by_path(vllm, checkpoint, tmp_path):
    from safetensors.numpy import save_file

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": np.ones((9, 32), np.float32), f"{name}B.weight": np.ones((32, 9), np.float32)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 9, "lora_alpha": 8}))
    engine, _ = load_engine(checkpoint, engine="vllm", adapters={"tuned": tmp_path}, **LIMITS)
    FakeEngine.made.script = [5]
    read(engine.submit(request(adapter="tuned")))
    assert FakeEngine.made.asked[0][3] == ("tuned", 1, str(tmp_path))
    settings = FakeEngine.made.args.settings
    assert (settings["max_lora_rank"], settings["max_loras"]) == (16, 2), "on a CPU the base needs a slot too"
    assert engine.adapters == ("tuned",)
    with pytest.raises(RequestError, match="scores no prompts"):
        engine.submit(request(prompt_logprobs=0))
    engine.close()
    with pytest.raises(ArtifactError, match="does not take the adapter refused"):
        load_engine(checkpoint, engine="vllm", adapters={"refused": tmp_path}, **LIMITS)
    assert FakeEngine.made.down
