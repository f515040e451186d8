"""Embeddings over HTTP are the engine's own."""

import asyncio
import base64
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from raymill.api.embeddings import embed
from raymill.errors import RequestError

TEXTS = ["the dog ran", "A cat", "sat on the mat;", "\u732b", "12 miles", "the", "dog", "ran", "cat", "mat"]


def embeddings(real, texts, **changes):
    with real.http() as http:
        return http.post("/v1/embeddings", json={"model": "tiny", "input": texts, **changes}).json()


def own(real, text, adapter=None):
    return real.engine.embed(tuple(real.tokenizer.encode(text)), adapter).result()


def test_every_text_gets_its_vector_in_its_place(real):
    answer = embeddings(real, TEXTS)  # more than slots and queue hold
    assert [each["index"] for each in answer["data"]] == list(range(len(TEXTS)))
    for text, each in zip(TEXTS, answer["data"], strict=True):
        assert np.array_equal(np.float32(each["embedding"]), own(real, text))
        assert np.linalg.norm(each["embedding"]) == pytest.approx(1, abs=1e-6)
    tokens = sum(len(real.tokenizer.encode(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"]) == ("list", "tiny")


def test_a_text_may_be_ids_alone_or_in_a_list(real):
    ids = real.tokenizer.encode("A cat")
    for texts in ("A cat", ["A cat"], ids, [ids]):
        (found,) = embeddings(real, texts)["data"]
        assert np.array_equal(np.float32(found["embedding"]), own(real, "A cat"))


def test_base64_holds_the_same_numbers_and_the_models_dimensions_may_be_named(real):
    (coded,) = embeddings(real, "A cat", encoding_format="base64", dimensions=64)["data"]
    assert np.array_equal(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4"), own(real, "A cat"))


def test_wrong_dimensions_are_refused_before_any_text_is_read(real, monkeypatch):
    embeddings(real, "A cat", dimensions=64)
    asked = []
    monkeypatch.setattr("raymill.api.routes.embed", lambda *args: asked.append(args))
    assert embeddings(real, TEXTS, dimensions=63)["error"]["param"] == "dimensions" and not asked


def test_an_adapter_has_its_own_embeddings(real):
    (found,) = embeddings(real, "A cat", model="tuned")["data"]
    assert np.array_equal(np.float32(found["embedding"]), own(real, "A cat", "tuned"))
    assert not np.array_equal(own(real, "A cat"), own(real, "A cat", "tuned"))


def test_texts_count_in_the_metrics(real):
    def counted():
        with real.http(real.metrics_key) as http:
            lines = http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("raymill_prompt_tokens_total "))

    before = counted()
    tokens = embeddings(real, TEXTS)["usage"]["prompt_tokens"]
    assert counted() - before == tokens > 0


def test_a_model_that_fails_is_503(served):
    served.step.broken = True
    with served.http() as http:
        failed = http.post("/v1/embeddings", json={"model": "tiny", "input": ["x", "y"]})
        assert (failed.status_code, failed.json()["error"]["type"]) == (503, "server_error")


class Crowded:
    """An engine of two slots that is full at the calls numbered `full`."""

    max_seq_len, vocab_size = 8, 10

    def __init__(self, full=(), text_s=0.01):
        self.full, self.text_s, self.calls, self.texts, self.most = full, text_s, 0, [], 0

    def stats(self):
        return SimpleNamespace(num_slots=2)

    def embed(self, ids, adapter):
        self.calls += 1
        if self.calls in self.full:
            raise RequestError("the queue is full", status=429)
        self.texts.append(Future())
        self.most = max(self.most, sum(not text.done() for text in self.texts))
        asyncio.get_running_loop().call_later(self.text_s, done, self.texts[-1], np.float32([len(self.texts)]))
        return self.texts[-1]


def done(text, vector):
    if not text.cancelled():
        text.set_result(vector)


def test_no_more_texts_are_in_the_engine_than_it_has_slots():
    engine = Crowded()
    vectors = asyncio.run(embed(engine, [(1,)] * 6, None))
    assert [vector.tolist() for vector in vectors] == [[n] for n in range(1, 7)]
    assert engine.most == 2


def test_the_first_text_finds_the_queue_full_and_later_ones_wait():
    engine = Crowded(full={2, 3})
    assert len(asyncio.run(embed(engine, [(1,)] * 4, None))) == 4
    assert engine.calls == 6
    with pytest.raises(RequestError) as refused:
        asyncio.run(asyncio.wait_for(embed(Crowded(full={1}), [(1,)], None), 5))
    assert refused.value.status == 429


def test_a_text_out_of_bounds_is_refused_before_any_is_read():
    engine = Crowded()
    for wrong in ((1,) * 9, (10,), ()):
        with pytest.raises(RequestError):
            asyncio.run(embed(engine, [(1,), wrong], None))
    assert engine.calls == 0


def test_texts_of_a_client_that_left_are_taken_out():
    engine = Crowded(text_s=60)

    async def leave():
        asking = asyncio.ensure_future(embed(engine, [(1,)] * 6, None))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert len(engine.texts) == 2 and all(text.cancelled() for text in engine.texts)
