"""The API through real HTTP: what a client sees, and what is free when it has gone."""

import json
import threading
import time

import httpx
import openai
import pytest

from raymill.api.events import write_interval_s

MESSAGES = [{"role": "user", "content": "where is the cat"}]


def completion(served, **changes):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 8, **changes}
    with served.http() as http:
        return http.post("/v1/completions", json=body)


def chat(served, **changes):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, **changes}
    with served.http() as http:
        return http.post("/v1/chat/completions", json=body)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def recited(served, first, count):
    script = served.step.script
    return served.tokenizer.decode([script[(first + n) % len(script)] for n in range(count)])


def test_the_openai_package_works_unchanged(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.client_key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        made = client.completions.create(model="tiny", prompt="the cat", max_tokens=8, temperature=0)
        prompt_tokens = len(served.tokenizer.encode("the cat"))
        assert made.choices[0].text == recited(served, prompt_tokens, 8)
        assert (made.choices[0].finish_reason, made.object) == ("length", "text_completion")
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompt_tokens, 8)
        talk = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=8, n=2)
        assert [choice.message.role for choice in talk.choices] == ["assistant"] * 2
        assert talk.usage.completion_tokens == 16
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == talk.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)
        pieces = list(client.completions.create(model="tiny", prompt="the cat", max_tokens=8, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == made.choices[0].text
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="x", logprobs=6)
        assert refused.value.param == "logprobs"


def test_a_stop_string_ends_the_text_and_is_not_shown(served):
    for stop in ("sat", ["mat", "sat"]):
        choice = completion(served, stop=stop, max_tokens=30).json()["choices"][0]
        assert choice["finish_reason"] == "stop" and "sat" not in choice["text"]
    streamed = events(completion(served, stop="sat", max_tokens=30, stream=True))
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]


def test_prompts_may_be_ids_or_one_in_a_list_or_empty(served):
    ids = served.tokenizer.encode("the cat")
    texts = [completion(served, prompt=p).json()["choices"][0]["text"] for p in ("the cat", ["the cat"], ids, [ids])]
    assert len(set(texts)) == 1
    assert completion(served, prompt="").json()["usage"]["prompt_tokens"] == 1


def test_text_that_spells_a_control_token_is_text(served):
    plain = completion(served, prompt="<|endoftext|>").json()["usage"]["prompt_tokens"]
    assert plain > 5


def test_the_default_length_is_16_for_completions_and_the_rest_of_the_context_for_chat(served):
    assert completion(served, max_tokens=None).json()["usage"]["completion_tokens"] == 16
    usage = chat(served, max_tokens=None).json()["usage"]
    assert usage["total_tokens"] == 128


def test_choices_of_a_stream_carry_their_index(served):
    seen = events(completion(served, n=3, stream=True))
    texts = ["".join(e["choices"][0]["text"] for e in seen if e["choices"][0]["index"] == i) for i in range(3)]
    assert len(set(texts)) == 1 and texts[0]
    assert sorted(e["choices"][0]["index"] for e in seen if e["choices"][0]["finish_reason"]) == [0, 1, 2]


def test_the_same_seed_gives_the_same_text_and_usage_is_null_until_the_end(served):
    made = [
        completion(served, seed=5, temperature=2.0, top_p=0.99, top_k=50).json()["choices"][0]["text"] for _ in range(2)
    ]
    assert made[0] == made[1]
    seen = events(completion(served, stream=True, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in seen[:-1]) and seen[-1]["usage"]["completion_tokens"] == 8


def test_the_first_token_is_sent_at_once_and_later_ones_share_writes(served):
    served.step.pause_s = 0.002
    began, first, writes = time.monotonic(), None, 0
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 100, "stream": True}
    with served.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            first = first or time.monotonic() - began
            writes += line.startswith("data: {")
    assert first < 0.15 < time.monotonic() - began
    assert writes < 80, "100 tokens of 2 ms each, written every 5 ms"


def test_many_streams_are_written_less_often_each(served, monkeypatch):
    assert [round(write_interval_s(0.02, streams), 3) for streams in (1, 12, 32, 64)] == [0.02, 0.02, 0.06, 0.1]
    assert write_interval_s(0.0, 32) == 0.0, "each token by itself, where that is asked for"
    asked = [0]
    monkeypatch.setattr(
        "raymill.api.routes.write_interval_s", lambda every_s, streams: asked.append(streams) or every_s
    )
    body = {"model": "tiny", "max_tokens": 3, "stream": True}
    deadline = time.monotonic() + 5
    with served.http() as http:
        events(http.post("/v1/completions", json={**body, "prompt": ["the cat"] * 16}))
        assert asked[-1] >= 16
        while asked[-1] != 1 and time.monotonic() < deadline:  # a stream is closed a moment after its last event
            events(http.post("/v1/completions", json={**body, "prompt": "the cat"}))
    assert asked[-1] == 1, "streams that ended do not count"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_goes_away_frees_its_slots(served, stream, choices):
    served.step.pause_s = 0.02
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 100, "stream": stream, "n": choices}
    with served.http() as http:
        try:
            with http.stream("POST", "/v1/completions", json=body, timeout=0.3) as response:
                lines = response.iter_lines()  # kept: a generator that is dropped closes the response
                next(lines)
                assert served.engine.stats().active == choices
        except httpx.ReadTimeout:
            assert not stream
    began = time.monotonic()
    assert served.settled()
    assert time.monotonic() - began < 1, "100 tokens would have taken 2 s"


@pytest.mark.parametrize("stream", [True, False])
def test_a_completion_that_takes_too_long_is_given_up_and_its_slots_are_free(served, stream):
    served.step.pause_s = 0.1
    began = time.monotonic()
    answer = completion(served, max_tokens=100, n=2, stream=stream)
    assert 3.5 < time.monotonic() - began < 6, "100 tokens would take 10 s"
    error = events(answer)[-1]["error"] if stream else answer.json()["error"]
    assert (answer.status_code, error["code"]) == (200 if stream else 504, "timeout")
    assert served.settled()


def test_clients_that_leave_while_they_queue_free_the_queue(served):
    served.step.pause_s = 0.05

    def leave():
        with served.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 120}, timeout=0.3)

    threads = [threading.Thread(target=leave) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join(10) for thread in threads]
    assert served.settled()


def test_a_full_queue_answers_429_with_retry_after_and_others_go_on(served):
    served.step.pause_s = 0.01
    answers = []

    def ask():
        answers.append(completion(served, max_tokens=40))

    threads = [threading.Thread(target=ask) for _ in range(14)]
    [thread.start() for thread in threads], [thread.join(20) for thread in threads]
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_choices_that_do_not_all_fit_are_refused_together(served):
    served.step.pause_s = 0.02
    busy = [threading.Thread(target=completion, args=(served,), kwargs={"max_tokens": 60}) for _ in range(6)]
    [thread.start() for thread in busy]
    time.sleep(0.2)
    assert completion(served, n=4).status_code == 429
    stats = served.engine.stats()
    assert stats.active + stats.queued <= 6
    [thread.join(20) for thread in busy]


def test_a_model_that_fails_is_500_or_an_error_event_and_then_unhealthy(served):
    served.step.broken = True
    failed = completion(served)
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
    seen = events(completion(served, stream=True))
    assert seen[-1]["error"]["code"] == "internal_error"
    chat(served)
    with served.http() as http:
        assert http.get("/health").status_code == 503
        served.step.broken = False
        assert completion(served).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}


def scraped(served):
    with served.http(served.metrics_key) as http:
        text = http.get("/metrics").text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_metrics_count_clients_that_left_and_what_the_model_failed_on(served):
    before = scraped(served)
    served.step.pause_s = 0.02
    with served.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 100}, timeout=0.3)
    assert served.settled()
    served.step.broken = True
    completion(served), completion(served, stream=True)
    served.step.broken, served.step.pause_s = False, 0.0
    completion(served)
    after = scraped(served)
    names = ("raymill_clients_gone_total", "raymill_failed_completions_total")
    assert [after[name] - before.get(name, 0) for name in names] == [1, 2]


def test_metrics_count_what_happened(served):
    before = scraped(served)
    prompt_tokens = completion(served, max_tokens=8).json()["usage"]["prompt_tokens"]
    completion(served, n=99)
    after = scraped(served)
    ok, bad = (f'raymill_requests_total{{route="/v1/completions",status="{status}"}}' for status in (200, 400))
    assert after[ok] - before[ok] == 1 and after[bad] - before.get(bad, 0) == 1
    tokens = "raymill_completion_tokens_total"
    assert after[tokens] - before[tokens] == 8
    tokens = "raymill_prompt_tokens_total"
    assert after[tokens] - before[tokens] == prompt_tokens > 0
    assert after["raymill_first_token_seconds_count"] - before["raymill_first_token_seconds_count"] == 1
    assert after["raymill_replicas_up"] == 1 and after["raymill_slots"] == 4


def test_a_path_that_a_stranger_types_is_no_label_of_the_metrics(served):
    with served.http("sk-wrong") as stranger:
        for path in ("/typed-by-a-stranger", "/v1/models/typed-by-a-stranger"):
            stranger.get(path)
    with served.http(served.metrics_key) as http:
        text = http.get("/metrics").text
    assert "stranger" not in text
    assert all(f'route="{route}",status="401"' in text for route in ("other", "/v1/models/{model}"))
