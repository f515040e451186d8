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
