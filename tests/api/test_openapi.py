"""The OpenAPI document says what is taken and answered, no more and no less."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import jsonschema
import pytest

from raymill.api.openapi import openapi_document, whole_numbers_below

SMALL = hypothesis.settings(
    max_examples=4, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


def beside(name):
    """The module of that name in this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def body_schema(name, **bounds):
    document = openapi_document(
        **{"models": ["tiny", "tuned"], "max_seq_len": 128, "vocab_size": 271, "dimensions": 8, **bounds}
    )
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def test_every_route_is_described_and_opens_with_the_key_it_names(served):
    with served.http() as http:
        document = http.get("/openapi.json").json()
    from raymill.api.auth import POLICY

    described = document["paths"]
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
    limits = beside("test_limits")
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


FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
EDGES = [
    ("CompletionRequest", {"model": "tiny"}, {"model": "tuned"}),
    ("CompletionRequest", {"prompt": [270] * 128, "max_tokens": 0}, {"prompt": [271]}),
    ("CompletionRequest", {"prompt": [[1] * 128], "max_tokens": 0}, {"prompt": [1] * 129, "max_tokens": 0}),
    ("CompletionRequest", {"prompt": ["x"] * 256, "max_tokens": 0}, {"prompt": ["x"] * 257}),
    ("CompletionRequest", {"prompt": ""}, {"prompt": [[1] * 129], "max_tokens": 0}),
    ("CompletionRequest", {"max_tokens": 127}, {"max_tokens": 128}),
    ("CompletionRequest", {"logit_bias": {"270": 1}}, {"logit_bias": {"271": 1}}),
    ("CompletionRequest", {"suffix": ""}, {"suffix": "x"}),
    ("ChatRequest", {"max_completion_tokens": 64}, {"max_completion_tokens": 128}),
    ("ChatRequest", {"max_tokens": 4, "max_completion_tokens": 4}, {"max_tokens": 128, "max_completion_tokens": 4}),
    ("ChatRequest", {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
    ("ChatRequest", {"tools": [], "tool_choice": "none", "store": False}, {"tool_choice": "auto"}),
    ("ChatRequest", {"response_format": FORM}, {"response_format": {**FORM, "type": "json_object"}}),
    ("ChatRequest", {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema"}}),
    ("EmbeddingRequest", {"dimensions": 8}, {"dimensions": 9}),
    ("EmbeddingRequest", {"input": ["x"]}, {"input": ""}),
    ("EmbeddingRequest", {"input": [1] * 128}, {"input": ["x", ""]}),
]


@pytest.mark.parametrize("name,good,bad", EDGES, ids=str)
def test_the_document_has_the_bounds_that_are_checked(served, name, good, bad):
    """The last value that is taken and the first that is not; those of the model among them."""
    limits = beside("test_limits")
    path = next(path for path, model in limits.BODIES.items() if model.__name__ == name)
    validator = jsonschema.Draft202012Validator(body_schema(name, models=["tiny"]))
    for changes, taken in ((good, True), (bad, False)):
        body = limits.body_of(path, **changes)
        with served.http() as http:
            assert (http.post(path, json=body).status_code == 200) == taken
        assert validator.is_valid(body) == taken


NUMBER = {"type": "integer", "minimum": 0, "maximum": 9}
ACCEPTED = [
    {"type": "string", "pattern": "^a+$", "minLength": 1, "maxLength": 3},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "exclusiveMaximum": 50},
    {"$ref": "#/$defs/number", "$defs": {"number": NUMBER}},
    {"$ref": "#/definitions/number", "definitions": {"number": NUMBER}},
    {"oneOf": [NUMBER, {"type": "null"}]},
    {"allOf": [NUMBER, {"maximum": 5}]},
    {"type": "integer", "maximum": 5, "exclusiveMinimum": 1},
    {"const": [1, {"a": None}]},
    {"enum": ["x", 2.5, True]},
    {"anyOf": [{"const": 1}, {"const": 2}]},
    {"type": "array", "items": NUMBER, "prefixItems": [NUMBER], "minItems": 1, "maxItems": 2},
    {"properties": {"a": NUMBER}, "required": ["a"], "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    {"type": "string", "format": "date"},
    {"type": "null", "title": "t", "description": "d", "default": None, "examples": [None], "deprecated": True},
    {"type": "null", "$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "c", "readOnly": True, "writeOnly": False},
]  # fmt: skip
REFUSED = [
    {"not": NUMBER},
    {"uniqueItems": True},
    {"if": NUMBER},
    {"type": "text"},
    {"format": "iri"},
    {"minProperties": 2},
    {"multipleOf": 0},
    {"multipleOf": 1001},
    {"minLength": 10_001},
    {"maximum": 2**54},
    {"const": 2**54},
    {"default": [1e300]},
    {"anyOf": []},
    {"items": [NUMBER]},
    {"pattern": "a" * 257},
    {"$defs": {str(n): NUMBER for n in range(65)}},
    {"required": "a"},
]


@pytest.mark.parametrize("schema,good", [*((s, True) for s in ACCEPTED), *((s, False) for s in REFUSED)], ids=str)
def test_the_document_says_which_schemas_a_completion_may_have_to_conform_to(real, schema, good):
    """Those of a response_format, keyword by keyword."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "response_format": form}
    with real.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == (200 if good else 400), answer.text
    assert jsonschema.Draft202012Validator(body_schema("ChatRequest")).is_valid(body) == good


def test_every_keyword_that_is_documented_is_tried():
    documented = body_schema("ChatRequest")["components"]["schemas"]["JsonSchema"]["properties"].keys()
    assert documented == {keyword for schema in ACCEPTED for keyword in schema}


def test_the_hooks_of_schemathesis_count_no_fewer_tokens_than_there_are(roomy):
    """Nor many more: what they leave out is not looked at."""
    pytest.importorskip("schemathesis")
    hooks = beside("schemathesis_hooks")
    turn = {"role": "user", "content": "xy \u732b"}
    parts = {"role": "user", "content": [{"type": "text", "text": "xy"}] * 2}
    with roomy.http() as http:
        assert hooks.context_of(http.get("/openapi.json").json()) == 1024
        for path, body, most in (
            ("completions", {"prompt": "x \u732b"}, 5),
            ("completions", {"prompt": ""}, 1),
            ("completions", {"prompt": ["four", "\u732b"]}, 4),
            ("completions", {"prompt": [[7, 8.0], [9]]}, 2),
            ("embeddings", {"input": [7, 8.0]}, 2),
            ("chat/completions", {"messages": [turn]}, 38),
            ("chat/completions", {"messages": [turn, parts]}, 90),
        ):
            assert hooks.most_tokens(body) == most
            answer = http.post(f"/v1/{path}", json={"model": "tiny", **body}).json()
            texts = len(body.get("prompt", "")) if isinstance(body.get("prompt"), list) else 1
            assert answer["usage"]["prompt_tokens"] <= most * texts


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models/{model}"])
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_nothing(roomy, path, mode):
    schemathesis = pytest.importorskip("schemathesis")
    schemathesis.hooks.unregister_all()
    beside("schemathesis_hooks")
    headers = {"Authorization": f"Bearer {roomy.client_key}"}
    document = schemathesis.openapi.from_url(f"{roomy.url}/openapi.json", headers=headers)
    operation = document[path]["get" if "{" in path else "post"]

    @SMALL
    @hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def answers_as_it_says(case):
        case.call_and_validate(headers=headers)

    answers_as_it_says()


KEYS = """
headers = {{ Authorization = "Bearer {client}" }}
[[operations]]
include-path = "/metrics"
headers = {{ Authorization = "Bearer {metrics}" }}
"""


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_500_cases_of_each_route(roomy, tmp_path):
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(KEYS.format(client=roomy.client_key, metrics=roomy.metrics_key))
    made = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{roomy.url}/openapi.json", "--max-examples", "500"),
            *("--continue-on-failure", "--seed", "1", "--generation-database", "none", "--no-color"),
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schemathesis_hooks.py"))},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    print(made.stdout[-1000:])
    assert made.returncode == 0 and "No issues found" in made.stdout, made.stdout[-5000:]
