"""Every limit, every refusal: the status, OpenAI's shape, the field's name, and nothing left behind."""

import json
import socket
import time
from contextlib import suppress

import pytest

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SHAPE = {"message", "type", "param", "code"}


def refusal(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == SHAPE and error["message"] and error["type"]
    return error


def post(served, path=COMPLETION, **changes):
    base = {"model": "tiny", "prompt": "x"} if path == COMPLETION else {"model": "tiny", "messages": [user("x")]}
    with served.http() as http:
        return http.post(path, content=json.dumps({**base, **changes}))


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
@pytest.mark.parametrize(
    "field,value",
    [
        ("n", 0),
        ("n", 5),
        ("n", 2**63),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 129),
        ("max_tokens", 2**63),
        ("max_tokens", 10**400),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", 0),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", "x" * 65),
        ("stop", ["a"] * 5),
        ("stop", ["a"] * 10_000),
        ("stop", [["a"]]),
        ("stop", 7),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("user", "u" * 257),
        ("logit_bias", {"1": 100}),
        ("presence_penalty", 1),
        ("frequency_penalty", -1),
        ("logprobs", True),
        ("frobnicate", 1),
        ("a" * 2000, 1),
    ],
)
def test_a_parameter_out_of_bounds_is_400_by_its_name(served, path, field, value):
    began = time.monotonic()
    error = refusal(post(served, path, **{field: value}), 400)
    assert error["param"] in (field[:256], None) and (error["param"] or value == 10**400)
    assert len(error["message"]) < 1000
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "field,value",
    [("echo", True), ("best_of", 2), ("suffix", "end"), ("logprobs", 0), ("logprobs", 5)],
)
def test_fields_of_completions_we_do_not_have_are_named(served, field, value):
    assert refusal(post(served, **{field: value}), 400)["param"] == field


@pytest.mark.parametrize(
    "field,value",
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 3),
        ("functions", [{}]),
        ("modalities", ["audio"]),
        ("audio", {}),
        ("store", True),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("max_completion_tokens", 0),
        ("messages", []),
        ("messages", [user("x")] * 257),
        ("messages", "hello"),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [user(None)]),
        ("messages", [user([{"type": "image_url", "image_url": "file:///etc/passwd"}])]),
        ("messages", [{**user("x"), "name": "eve"}]),
        ("messages", [user("y " * 400)]),
        ("messages", [user("x" * 5000)]),
    ],
)
def test_what_chat_does_not_take_is_named(served, field, value):
    assert refusal(post(served, CHAT, **{field: value}), 400)["param"] == field


@pytest.mark.parametrize(
    "prompt",
    [["a", "b"], [[1], [2]], [1.5], [True], [300], [-1], [2**40], {"a": 1}, None, 7, "y " * 400, "x" * 5000, [1] * 128],
)
def test_a_prompt_that_cannot_be_is_refused(served, prompt):
    assert refusal(post(served, prompt=prompt), 400)["param"] == "prompt"


def test_values_that_ask_for_nothing_are_accepted(served):
    quiet = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "stop": None, "n": None}
    assert post(served, **quiet, echo=False, best_of=1, suffix=None, logprobs=None).status_code == 200
    assert post(served, CHAT, **quiet, tools=[], response_format={"type": "text"}, store=False).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60_000, b'{"a":' * 12_000, b'{"temperature": NaN}',
     b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', b'{"model": "tiny", "prompt": "\\ud800"}'],
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
        refusal(http.post(COMPLETION, content=b"{}", headers={"Content-Encoding": "gzip"}), 400)


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
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == SHAPE and "within 1 s" in error["message"]


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
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
