"""What one request writes is the same to the bit, whatever the engine does beside it."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from raymill.compression.quantize import quantize_model, save_quantized
from raymill.inference import native, scheduler
from raymill.inference.engine import BatchingEngine
from raymill.inference.native_step import NativeStep
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.inference.torch_step import TorchStep
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer

VOCAB, NUM_PAGES = 61, 80


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    shape = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 160}
    model = Transformer(ModelConfig(**shape), VOCAB)
    model.initialize(seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    quantize_model(model.requires_grad_(False).eval())
    folder = tmp_path_factory.mktemp("model")
    save_quantized(folder, model, 0)
    return folder


class Ids:
    """Every id is a character of its own."""

    def push(self, token):
        return chr(0x100 + token)

    def finish(self):
        return ""


def steps(folder, kind, num_pages=NUM_PAGES):
    if kind == "torch":
        from raymill.compression.quantize import load_served_model

        return TorchStep(load_served_model(folder), num_pages)
    if native.library() is None:
        pytest.skip("no C++ compiler")
    return NativeStep.load(folder, num_pages=num_pages, kv_precision="fp32", threads=1)


def requests(count=10):
    rng = random.Random(3)
    common = [rng.randrange(VOCAB) for _ in range(70)]
    made = []
    for n in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 40]))]
        prompt = common[: rng.choice([0, 32, 64, 70])] + own
        if n % 3 == 0:
            prompt += prompt[:9] * 2
        sampling = Sampling(temperature=0) if n % 2 else Sampling(temperature=0.7, seed=n, top_p=0.9)
        if n % 5 == 0:
            sampling = replace(sampling, repetition_penalty=1.1)
        most = min(90, 160 - len(prompt[:150]))
        made.append(Request(str(n), tuple(prompt[:150]), most, sampling, logprobs=2 if n % 4 == 1 else None))
    return made


def _events(stream):
    return [event for batch in stream for event in batch]


def run(step, wanted, *, together=True, **settings):
    """Texts by request, and what the engine counted."""
    settings = {"num_slots": 16, "max_queued": 99, "max_step_tokens": 64, **settings}
    engine = BatchingEngine(step, Ids, **settings)
    try:
        if together:
            streams = {request.id: engine.submit(request) for request in wanted}
            events = {name: _events(stream) for name, stream in streams.items()}
        else:
            events = {}
            for request in wanted:
                events[request.id] = _events(engine.submit(request))
        assert engine._scheduler.pool.available == step.num_pages
        return {name: ([e.text for e in each], [e.token for e in each]) for name, each in events.items()}, engine
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_text_is_the_same_alone_together_cut_preempted_cached_and_drafted(checkpoint, kind, monkeypatch):
    exact = kind == "native"  # torch's products and attention are the same to rounding only

    def same(found):
        texts = {name: text for name, (text, _) in found.items()}
        assert texts == {name: text for name, (text, _) in alone.items()}
        assert not exact or found == alone, "log probabilities to the bit"

    monkeypatch.setattr(scheduler, "MOST_SEQUENCES", 0)
    wanted = requests(10 if exact else 5)
    alone = {}
    for request in wanted:
        alone |= run(steps(checkpoint, kind), [request], max_step_tokens=400)[0]
    assert len({tuple(text) for text, _ in alone.values()}) == len(wanted)
    warm = steps(checkpoint, kind)
    for found in (run(warm, wanted)[0], run(warm, wanted, num_slots=3, max_step_tokens=9)[0]):
        same(found)
    tight, engine = run(steps(checkpoint, kind, num_pages=6), wanted, num_slots=5, max_step_tokens=30)
    same(tight)
    assert engine.stats().preemptions > 0
    again = BatchingEngine(warm, Ids, num_slots=4, max_queued=99, max_step_tokens=40)
    for _ in range(2):  # the second time every full page is found
        for request in wanted:
            text = [event.text for event in _events(again.submit(request))]
            assert text == alone[request.id][0]
    again.close()
    monkeypatch.setattr(scheduler, "MOST_SEQUENCES", 99)
    drafted = Counting(steps(checkpoint, kind))
    same(run(drafted, wanted, together=False)[0])
    assert drafted.drafts > 5
    drafted = Counting(steps(checkpoint, kind))
    same(run(drafted, wanted, num_slots=3)[0])
    assert drafted.drafts > 5


class Counting:
    """Counts the drafts that a step is asked to check."""

    def __init__(self, inner):
        self.inner, self.drafts = inner, 0
        self.num_pages, self.max_seq_len, self.vocab_size = inner.num_pages, inner.max_seq_len, inner.vocab_size

    def __call__(self, chunks, table):
        self.drafts += sum(chunk.num_logits > 1 for chunk in chunks)
        return self.inner(chunks, table)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_prompt_scores_and_embeddings_do_not_depend_on_company(checkpoint, kind):
    wanted = [replace(request, prompt_logprobs=1) for request in requests(6)]

    def ask(num_pages=NUM_PAGES, **settings):
        step = steps(checkpoint, kind, num_pages)
        engine = BatchingEngine(step, Ids, **{"num_slots": 16, "max_queued": 99, "max_step_tokens": 400, **settings})
        streams = [engine.submit(request) for request in wanted]
        futures = [engine.embed(request.prompt_ids) for request in wanted]
        firsts = [_events(stream)[0] for stream in streams]  # to their ends
        prompts = [first.prompt for first in firsts]
        vectors = [future.result(30) for future in futures]
        assert engine._scheduler.pool.available == num_pages
        preemptions = engine.stats().preemptions
        engine.close()
        return prompts, vectors, preemptions

    prompts, vectors, _ = ask(num_slots=1)
    assert [len(prompt) for prompt in prompts] == [len(request.prompt_ids) for request in wanted]
    assert all(abs(float(np.linalg.norm(vector)) - 1) < 1e-6 for vector in vectors)
    for settings in ({}, {"max_step_tokens": 17}, {"num_pages": 6, "num_slots": 4, "max_step_tokens": 33}):
        found, others, preempted = ask(**settings)
        assert preempted or "num_pages" not in settings
        for ours, theirs in zip(prompts, found, strict=True):
            assert [each.token for each in ours] == [each.token for each in theirs]
            assert ours[0].logprob is None and theirs[0].logprob is None
            difference = (
                max(abs(a.logprob - b.logprob) for a, b in zip(ours[1:], theirs[1:], strict=True)) if ours[1:] else 0
            )
            assert difference == 0 if kind == "native" else difference < 1e-4
        for ours, theirs in zip(vectors, others, strict=True):
            assert np.array_equal(ours, theirs) if kind == "native" else np.allclose(ours, theirs, atol=1e-5)


def test_scores_are_the_models_own(checkpoint):
    from raymill.compression.quantize import load_served_model

    request = replace(requests(3)[2], prompt_logprobs=3, max_tokens=0)
    engine = BatchingEngine(steps(checkpoint, "torch"), Ids, num_slots=2, max_queued=2, max_step_tokens=20)
    events = _events(engine.submit(request))
    embedding = engine.embed(request.prompt_ids).result(10)
    engine.close()
    assert [(e.text, e.finish_reason, e.counts) for e in events] == [("", "length", False)]
    model, ids = load_served_model(checkpoint), torch.tensor([request.prompt_ids])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids)[0].double(), -1)
    expected = [float(scores[n, token]) for n, token in enumerate(request.prompt_ids[1:])]
    assert [each.logprob for each in events[0].prompt[1:]] == pytest.approx(expected, abs=1e-3)
    top = events[0].prompt[5].top
    assert [token for token, _ in top] == scores[4].topk(3).indices.tolist()
    assert len(embedding) == 64


def test_a_native_replica_never_imports_torch():
    program = """
import sys
from raymill.inference import engine, scheduler, loading, native_step, stream
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.inference.step import StepOutput
import numpy as np
class Step:
    vocab_size, max_seq_len, num_pages = 8, 64, 4
    def __call__(self, chunks, table):
        return StepOutput(30 * np.eye(8, dtype=np.float32)[[3] * sum(c.num_logits for c in chunks)])
class Ids:
    push = staticmethod(str)
    finish = staticmethod(str)
e = engine.BatchingEngine(Step(), Ids, num_slots=2, max_queued=2, max_step_tokens=8)
print("".join(x.text for b in e.submit(Request("r", (1,), 4, Sampling(temperature=0.5))) for x in b))
e.close()
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numba", "transformers", "ray"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["3333", "[]"]
