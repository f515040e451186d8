"""Embeddings over HTTP are the engine's own."""

import base64

import numpy as np
import pytest

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


def test_an_adapter_has_its_own_embeddings(real):
    (found,) = embeddings(real, "A cat", model="tuned")["data"]
    assert np.array_equal(np.float32(found["embedding"]), own(real, "A cat", "tuned"))
    assert not np.array_equal(own(real, "A cat"), own(real, "A cat", "tuned"))


def test_a_model_that_fails_is_503_and_the_first_text_too_many_is_429(served):
    served.step.broken = True
    with served.http() as http:
        failed = http.post("/v1/embeddings", json={"model": "tiny", "input": ["x", "y"]})
        assert (failed.status_code, failed.json()["error"]["type"]) == (503, "server_error")
