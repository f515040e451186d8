"""Every limit, every refusal: the status, OpenAI's shape, the field's name, and nothing left behind."""

import gc
import json
import socket
import time
import tracemalloc
from contextlib import suppress

import pytest
from starlette.testclient import TestClient

from raymill.api.chat_requests import ChatRequest
from raymill.api.completion_requests import CompletionRequest
from raymill.api.embeddings import EmbeddingRequest
from raymill.api.routes import ApiSettings, create_app
from raymill.api.schema import parse
from raymill.errors import RequestError
from raymill.telemetry.metrics import Metrics

COMPLETION, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
BODIES = {COMPLETION: CompletionRequest, CHAT: ChatRequest, EMBEDDINGS: EmbeddingRequest}
SHAPE = {"message", "type", "param", "code"}


def refusal(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == SHAPE and error["message"] and error["type"]
    return error


def body_of(path, **changes):
    own = {COMPLETION: {"prompt": "x"}, CHAT: {"messages": [user("x")]}, EMBEDDINGS: {"input": "x"}}[path]
    return {"model": "tiny", **own, **changes}


def post(served, path=COMPLETION, **changes):
    with served.http() as http:
        return http.post(path, content=json.dumps(body_of(path, **changes)))


def user(content):
    return {"role": "user", "content": content}


BOTH = {
    "n": [0, -1, 17, 2**31, 2**63, 2**64, 10**30, True, 1.5, "1", [1], {}],
    "temperature": [-0.1, 2.1, 1e300, "hot", True, [0], {}],
    "top_p": [-0.1, 1.1, "1", True],
    "top_k": [0, -1, 2**31, 2**63, 0.5, True],
    "min_p": [-0.1, 1.1, "0", True],
    "presence_penalty": [-2.1, 2.1, "1", True],
    "frequency_penalty": [-2.1, 2.1, "1", True],
    "repetition_penalty": [0, 0.009, 5e-324, -1, 2.1, "1", True],
    "logit_bias": [
        [],
        7,
        {"300": 1},
        {"-1": 1},
        {"01": 1},
        {"x": 1},
        {"\u0661": 1},
        {"9" * 30: 1},
        {"1": 101},
        {"1": -101},
        {"1": "1"},
        {"1": True},
        {str(n): 1 for n in range(301)},
        {str(n): "x" for n in range(5000)},
    ],
    "seed": [2**63, -(2**63) - 1, 0.5, "7", True],
    "stop": ["", "x" * 65, ["a"] * 5, ["a"] * 10_000, [7] * 10_000, [["a"]], [None], 7, True, {}],
    "stream": ["yes", 1, []],
    "stream_options": [{"include_usage": True}, {"x": 1}, [], 1, {"include_usage": None}],
    "user": ["u" * 257, 7],
    "safety_identifier": ["u" * 257],
    "prompt_cache_key": ["u" * 257],
    "max_tokens": [-1, 128, 129, 2**63, 2**64, "5", 1.5, True, []],
    "frobnicate": [1, None, {}],
    "a" * 2000: [1],
}
TEXT = {
    "prompt": [
        ["a", [1]],
        [[1], "a"],
        [[1], []],
        [],
        [1.5],
        [True],
        [300],
        [-1],
        [2**40],
        [2**64],
        [[[1]]],
        [None],
        ["a"] * 257,
        [[1]] * 257,
        {"a": 1},
        None,
        7,
        "y " * 400,
        "x" * 5000,
        [1] * 128,
        [1] * 20_000,
        ["ok", "y " * 400],
    ],
    "logprobs": [-1, 6, 2**63, True, 1.5, "1"],
    "echo": [1, "yes"],
    "best_of": [0, 2, 17, True],
    "suffix": ["end"],
    "tools": [[]],
    "messages": [[]],
}
TALK = {
    "max_tokens": [0],
    "max_completion_tokens": [0, 128, 2**63, True],
    "logprobs": [0, 5, "yes"],
    "top_logprobs": [3, -1, 21, 2**63, True],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["auto"],
    "functions": [[{}]],
    "modalities": [["audio"]],
    "audio": [{}],
    "store": [True],
    "prediction": [{}],
    "reasoning_effort": ["high"],
    "parallel_tool_calls": [1],
    "echo": [True],
    "response_format": [
        {},
        [],
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "two words", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"unheard": 1}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "(a{500}){500}"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [0] * 2000}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": [], "strict": 1}},
        {str(n): 1 for n in range(5000)},
    ],
    "messages": [
        [],
        [{"role": "user", "content": "x"}] * 257,
        [7] * 10_000,
        "hello",
        None,
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 257}],
        [{"role": "user", "content": "x", "name": "eve"}],
        [{"role": "user", "content": "x", **{str(n): 1 for n in range(5000)}}],
        [{"role": "user", "content": "y " * 400}],
        [{"role": "user", "content": "x" * 5000}],
    ],
}
VECTORS = {
    "input": [*(value for value in TEXT["prompt"] if value != [1] * 128), [1] * 129, "", [""]],
    "encoding_format": ["hex", 1],
    "dimensions": [0, 7, 9, 2**63, True, "8"],
    "user": ["u" * 257],
    "temperature": [0],
}
CASES = [
    *((COMPLETION, field, value) for field, values in {**BOTH, **TEXT}.items() for value in values),
    *((CHAT, field, value) for field, values in BOTH.items() for value in values),
    *((CHAT, field, value) for field, values in TALK.items() for value in values),
    *((EMBEDDINGS, field, value) for field, values in VECTORS.items() for value in values),
]


@pytest.fixture(scope="module")
def http(served):
    with served.http() as client:
        yield client


@pytest.mark.parametrize("path,field,value", CASES, ids=lambda part: str(part)[:30])
def test_a_parameter_out_of_bounds_is_400_by_its_name(http, path, field, value):
    error = refusal(http.post(path, content=json.dumps(body_of(path, **{field: value}))), 400)
    assert error["param"] == field[:256]
    assert 10 < len(error["message"]) < 1000


@pytest.mark.parametrize(
    "path,field,value,limit",
    [
        (COMPLETION, "n", 17, "from 1 to 16"),
        (COMPLETION, "n", 2**64, "from 1 to 16"),
        (COMPLETION, "n", True, "from 1 to 16"),
        (CHAT, "temperature", 3, "from 0 to 2"),
        (CHAT, "repetition_penalty", 0, "from 0.01 to 2"),
        (CHAT, "top_logprobs", 21, "from 0 to 20"),
        (CHAT, "stop", ["a"] * 100_000, "at most 4"),
        (COMPLETION, "stop", "x" * 65, "1 to 64 characters"),
        (COMPLETION, "logit_bias", {str(n): 1 for n in range(301)}, "at most 300"),
        (COMPLETION, "logit_bias", {"300": 1}, "0 to 270"),
        (COMPLETION, "prompt", ["a"] * 257, "at most 256"),
        (COMPLETION, "prompt", [300], "0..270"),
        (COMPLETION, "max_tokens", 128, "at most 127"),
        (COMPLETION, "prompt", "x" * 5000, "limit is 4096"),
        (CHAT, "messages", [{"role": "user", "content": "x"}] * 257, "at most 256"),
        (EMBEDDINGS, "dimensions", 9, "set it to 8"),
        (EMBEDDINGS, "input", ["x", ""], "an empty text has no embedding"),
        (CHAT, "max_completion_tokens", 2**63, "from 1 to 2147483647"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_the_refusal_says_the_limit(served, path, field, value, limit):
    body = json.dumps(body_of(path, **{field: value}))
    if len(body) > 60_000:  # more than this server reads
        with pytest.raises(RequestError, match=limit):
            parse(BODIES[path], body.encode())
        return
    with served.http() as http:
        assert limit in refusal(http.post(path, content=body), 400)["message"]


@pytest.mark.parametrize(
    "path,changes,field,fix",
    [
        (COMPLETION, {"prompt": [1] * 100, "max_tokens": 29}, "max_tokens", "set max_tokens to at most 28"),
        (COMPLETION, {"prompt": [1] * 128}, "prompt", "shorten it"),
        (COMPLETION, {"prompt": [1] * 128, "max_tokens": 5}, "prompt", "shorten it"),
        (COMPLETION, {"prompt": [1] * 129, "max_tokens": 0}, "prompt", "shorten it"),
        (COMPLETION, {"prompt": "x" * 5000}, "prompt", "shorten it"),
        (CHAT, {"max_tokens": 127}, "max_tokens", "set max_tokens to at most"),
        (CHAT, {"max_completion_tokens": 127}, "max_completion_tokens", "set max_completion_tokens to at most"),
        (CHAT, {"messages": [user("y " * 400)]}, "messages", "shorten it"),
        (CHAT, {"messages": [user("y " * 400)], "max_completion_tokens": 5}, "messages", "shorten it"),
        (CHAT, {"messages": [user("x" * 5000)]}, "messages", "shorten it"),
        (EMBEDDINGS, {"input": [1] * 129}, "input", "shorten it"),
        (EMBEDDINGS, {"input": "x" * 5000}, "input", "shorten it"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_more_than_the_context_holds_has_a_code_and_words_of_its_own(served, path, changes, field, fix):
    """By which clients tell it from other mistakes."""
    error = refusal(post(served, path, **changes), 400)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert "maximum context length is 128 tokens" in error["message"] and fix in error["message"]


def test_both_names_of_a_chats_length_are_bounded_though_one_counts(served):
    for field, other in (("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")):
        error = refusal(post(served, CHAT, **{field: 128, other: 4}), 400)
        assert error["param"] == field and "at most 127" in error["message"]


@pytest.mark.parametrize("wrong", [[300], [1] * 129])
def test_the_last_of_many_prompts_is_checked_before_a_stream_begins(served, wrong):
    error = refusal(post(served, prompt=[[1]] * 20 + [wrong], stream=True), 400)
    assert error["param"] == "prompt"


def test_a_prompt_and_its_completion_may_fill_the_context(served):
    assert post(served, prompt=[1] * 100, max_tokens=28).json()["usage"]["total_tokens"] == 128
    assert post(served, prompt=[1] * 128, max_tokens=0).json()["usage"]["total_tokens"] == 128
    assert post(served, prompt=[1] * 120).json()["usage"]["completion_tokens"] == 8
    assert post(served, EMBEDDINGS, input=[1] * 128).status_code == 200


BOMBS = [
    (COMPLETION, b'{"model": "tiny", "stop": [' + b"7," * 120_000 + b"7]}"),
    (COMPLETION, b'{"model": "tiny", "prompt": [' + b"1," * 120_000 + b"-1]}"),
    (COMPLETION, b'{"model": "tiny", "prompt": [' + b'["x"],' * 40_000 + b"[]]}"),
    (COMPLETION, b'{"model": "tiny", "logit_bias": {' + b",".join(b'"%d":"x"' % n for n in range(20_000)) + b"}}"),
    (COMPLETION, b'{"model": "tiny", ' + b",".join(b'"%d":1' % n for n in range(25_000)) + b"}"),
    (CHAT, b'{"model": "tiny", "messages": [' + b"[]," * 80_000 + b"[]]}"),
    (CHAT, b'{"model": "tiny", "messages": [{' + b",".join(b'"%d":1' % n for n in range(25_000)) + b"}]}"),
    (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": [' + b"{}," * 80_000 + b"{}]}]}"),
    (CHAT, b'{"model": "tiny", "response_format": {"json_schema": {' + b",".join(b'"%d":1' % n for n in range(20_000)) + b"}}}"),
    (CHAT, b'{"model": "tiny", "messages": ' + b"[" * 120_000 + b"]" * 120_000 + b"}"),
    (CHAT, b'{"model": "tiny", "messages": ' + b"[" * 900 + b"]" * 900 + b"}"),
    (CHAT, b'{"model": "tiny", "max_tokens": ' + b"9" * 240_000 + b"}"),
    (EMBEDDINGS, b'{"model": "tiny", "input": [' + b'"",' * 80_000 + b'""]}'),
]  # fmt: skip


@pytest.mark.parametrize("path,body", BOMBS, ids=[f"{path}-{body[17:60]!r}" for path, body in BOMBS])
def test_a_bomb_is_refused_in_50_ms_and_10_mb(path, body):
    assert 100 < len(body) <= 256 * 1024
    gc.collect()
    gc.freeze()  # as a replica does: else the collector walks all that the test session has loaded
    times = []
    for _ in range(2):  # the first pays for what is compiled once
        began = time.process_time()
        with pytest.raises(RequestError) as refused:
            parse(BODIES[path], body)
        times.append(time.process_time() - began)
        assert refused.value.status == 400 and len(str(refused.value)) < 1000
    gc.unfreeze()
    assert min(times) < 0.05
    tracemalloc.start()
    with pytest.raises(RequestError):
        parse(BODIES[path], body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_a_wrong_schema_is_refused_before_anything_is_made_of_the_vocabulary(served, monkeypatch):
    """A replica that never met a right one has no grammars yet, and makes them for none but a right one."""
    made = []
    monkeypatch.setattr("raymill.api.routes.Grammars", lambda *args: made.append(args))
    settings = ApiSettings(model_name="tiny", quantization="none")
    client = TestClient(create_app(served.engine, served.tokenizer, settings, served.keys, Metrics()))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"unheard": 1}}}
    body = body_of(CHAT, response_format=form)
    refusal(client.post(CHAT, json=body, headers={"Authorization": f"Bearer {served.client_key}"}), 400)
    assert not made


def test_values_that_ask_for_nothing_are_accepted(served):
    quiet = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "stop": None, "n": None}
    assert post(served, **quiet, echo=False, best_of=1, suffix="", logprobs=None).status_code == 200
    assert post(served, CHAT, **quiet, tools=[], response_format={"type": "text"}, store=False).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60_000, b'{"a":' * 12_000, b'{"temperature": NaN}',
     b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', b'{"model": "tiny", "prompt": "\\ud800"}',
     b'{"model": "tiny", "prompt": "\xff"}', b'{"model": "tiny", "prompt": "x", "temperature": 1e400}',
     b'{"model": "tiny", "prompt": "x", "logit_bias": {"1": NaN}}', b'{"model": "tiny", "prompt": "x"} {}'],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_400(served, body):
    with served.http() as http:
        refusal(http.post(COMPLETION, content=body), 400)


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_missing_and_unknown_models(served, path):
    assert refusal(post(served, path, model=None), 400)["param"] == "model"
    assert refusal(post(served, path, model="other"), 404)["param"] == "model"
    assert refusal(post(served, path, model="m" * 300), 400)["param"] == "model"


def test_a_large_body_is_413_whether_declared_or_not(served):
    with served.http() as http:
        refusal(http.post(COMPLETION, content=b" " * (64 * 1024 + 1)), 413)
        refusal(http.post(COMPLETION, content=(b" " * 1000 for _ in range(100))), 413)
        assert http.post(COMPLETION, content=(b" " for _ in range(2000))).status_code == 400
        packed = http.post(COMPLETION, content=json.dumps(body_of(COMPLETION)), headers={"Content-Encoding": "gzip"})
        assert "compressed" in refusal(packed, 400)["message"]


def test_a_lie_about_the_length_is_refused_before_the_body_comes(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.client_key}\r\n"
        connection.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_never_ends_is_408(served, framing):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = (
            f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.client_key}\r\n{framing}\r\n\r\n"
        )
        began, answer = time.monotonic(), b""
        connection.sendall(head.encode())
        connection.settimeout(0.2)
        while b"}}" not in answer and time.monotonic() - began < 4:
            with suppress(TimeoutError):
                answer += connection.recv(4096)
            if not answer:
                connection.sendall(b"1\r\n \r\n" if "chunked" in framing else b" ")  # never silent, never done
        assert answer.startswith(b"HTTP/1.1 408") and 0.8 < time.monotonic() - began < 3
        headers, _, body = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in headers.lower(), "the rest of the body would be read as a request"
        error = json.loads(body)["error"]
        assert set(error) == SHAPE and "within 1 s" in error["message"]


@pytest.mark.parametrize("path", [COMPLETION, CHAT, EMBEDDINGS])
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/json; charset=latin-1", ""],
)
def test_a_body_that_is_said_not_to_be_json_is_415(served, path, kind):
    with served.http() as http:
        response = http.post(path, content=json.dumps(body_of(path)), headers={"Content-Type": kind})
        assert "application/json" in refusal(response, 415)["message"]
        good = {"Content-Type": "Application/JSON; charset=UTF-8"}
        assert http.post(path, content=json.dumps(body_of(path)), headers=good).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/openapi.json"])
def test_head_answers_as_get_without_a_body(served, path):
    with served.http() as http:
        head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content)) and head.headers["content-type"]


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("POST", "/openapi.json", 405),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/completions/", 404),
        ("GET", COMPLETION, 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("PUT", "/health", 405),
        ("TRACE", COMPLETION, 405),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_wrong_paths_and_methods_have_the_same_shape(served, method, path, status):
    with served.http() as http:
        response = http.request(method, path)
    refusal(response, status)
    assert (status != 405) or response.headers["allow"]


def test_no_other_origin_is_invited(served):
    with served.http() as http:
        response = http.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_mistake_of_ours_is_500_and_tells_a_client_nothing(served, monkeypatch):
    def submit(request):
        raise KeyError("inner secret")

    monkeypatch.setattr(served.engine, "submit", submit)
    settings = ApiSettings(model_name="tiny", quantization="none")
    app = create_app(served.engine, served.tokenizer, settings, served.keys, Metrics())
    client = TestClient(app, raise_server_exceptions=False)
    response = client.post(
        COMPLETION, json=body_of(COMPLETION), headers={"Authorization": f"Bearer {served.client_key}"}
    )
    error = refusal(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error") and "secret" not in response.text
