"""The OpenAPI document says what is taken and answered, no more and no less."""

import json
import re

import hypothesis
import jsonschema
import pytest

from raymill.api.openapi import openapi_document, whole_numbers_below

SMALL = hypothesis.settings(
    max_examples=4, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


def body_schema(name, **bounds):
    document = openapi_document(
        **{"models": ["tiny", "tuned"], "max_seq_len": 128, "vocab_size": 271, "dimensions": 8, **bounds}
    )
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def test_every_route_is_described_and_opens_with_the_key_it_names(served):
    with served.http() as http:
        document = http.get("/openapi.json").json()
    from raymill.api.auth import POLICY

    described = {path.replace("{model}", "{id}"): methods for path, methods in document["paths"].items()}
    assert described.keys() == POLICY.keys()
    for path, role in POLICY.items():
        method = described[path].get("get") or described[path]["post"]
        assert method.get("security", document["security"]) == ([{role: []}] if role else [])
    jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"]["CompletionRequest"])


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 11, 99, 100, 101, 271, 1000, 12345])
def test_ids_below_the_vocabularys_size_have_a_pattern(limit):
    pattern = re.compile(whole_numbers_below(limit))
    assert [n for n in range(3 * limit + 20) if pattern.fullmatch(str(n))] == list(range(limit))
    assert not any(pattern.fullmatch(text) for text in ("", "01", "-1", "1.0", " 1", "00"))


def test_what_the_document_refuses_is_refused_and_what_it_takes_is_taken(served):
    """The table of bad values of test_limits, against the document."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("limits", Path(__file__).with_name("test_limits.py"))
    limits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(limits)
    names = {limits.COMPLETION: "CompletionRequest", limits.CHAT: "ChatRequest", limits.EMBEDDINGS: "EmbeddingRequest"}
    validators = {path: jsonschema.Draft202012Validator(body_schema(name)) for path, name in names.items()}
    taken = [
        (path, field, str(value)[:60])
        for path, field, value in limits.CASES
        if len(json.dumps(value)) < 5000  # jsonschema takes seconds for what the API refuses in a millisecond
        and validators[path].is_valid(limits.body_of(path, **{field: value}))
    ]
    # The document cannot count tokens, nor say what a schema adds up to.
    assert {(path, field) for path, field, _ in taken} <= {
        (limits.COMPLETION, "prompt"),
        (limits.COMPLETION, "max_tokens"),
        (limits.CHAT, "messages"),
        (limits.CHAT, "response_format"),
        (limits.EMBEDDINGS, "input"),
    }, taken
    assert len(taken) < 16
    for path in validators:
        validators[path].validate(limits.body_of(path))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models/{model}"])
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_nothing(roomy, path, mode):
    schemathesis = pytest.importorskip("schemathesis")
    headers = {"Authorization": f"Bearer {roomy.client_key}"}
    document = schemathesis.openapi.from_url(f"{roomy.url}/openapi.json", headers=headers)
    operation = document[path]["get" if "{" in path else "post"]

    @SMALL
    @hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def answers_as_it_says(case):
        case.call_and_validate(headers=headers)

    answers_as_it_says()
