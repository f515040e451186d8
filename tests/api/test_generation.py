"""What a request for text may ask, over a real model: HTTP says what the engine says."""

import json

import numpy as np
import pytest

from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling

PROMPT = "A cat, \u732b, sat"
CHAT = [{"role": "user", "content": "the dog?"}]


def completion(real, **changes):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **changes}
    with real.http() as http:
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json() if not changes.get("stream") else events(response)


def chat(real, **changes):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0, **changes}
    with real.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json() if not changes.get("stream") else events(response)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def by_engine(real, prompt=PROMPT, max_tokens=12, sampling=None, **asked):
    """(text, events) of the engine's own door."""
    ids = tuple(real.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
    ends = frozenset({real.tokenizer.end_id})
    request = Request("own", ids, max_tokens, sampling or Sampling(temperature=0), stop_ids=ends, **asked)
    made = [event for batch in real.engine.submit(request) for event in batch]
    return "".join(event.text for event in made), made


@pytest.mark.parametrize(
    "asked,own",
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.9, "seed": 7}, {"temperature": 0.9, "seed": 7}),
        ({"temperature": 1.5, "seed": 7, "top_p": 0.7, "top_k": 9}, {"temperature": 1.5, "seed": 7, "top_p": 0.7, "top_k": 9}),
        ({"temperature": 1.5, "seed": 7, "min_p": 0.3}, {"temperature": 1.5, "seed": 7, "min_p": 0.3}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": ((65, 100.0),)}),
    ],
)  # fmt: skip
def test_text_over_http_is_the_engines_own(real, asked, own):
    expected, _ = by_engine(real, sampling=Sampling(**{"temperature": 0, **own}), max_tokens=40)
    answer = completion(real, max_tokens=40, **asked)
    assert texts(answer) == [expected] and expected
    streamed = completion(real, max_tokens=40, stream=True, **asked)
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected
    if "temperature" not in own and own:
        assert expected != by_engine(real, max_tokens=40)[0], "what was asked for changes nothing"


@pytest.mark.parametrize("top", [0, 1, 5])
def test_log_probabilities_of_completions_are_the_engines(real, top):
    text, made = by_engine(real, logprobs=top, max_tokens=30)
    choice = completion(real, logprobs=top, max_tokens=30)["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == text
    assert told["token_logprobs"] == pytest.approx([event.token.logprob for event in made])
    assert [len(each) for each in told["top_logprobs"]] == [max(top, 1)] * 30
    assert all(
        each[name] == value
        for each, name, value in zip(told["top_logprobs"], told["tokens"], told["token_logprobs"], strict=True)
    )
    names = [name_of(real, event.token.token) for event in made]
    assert told["tokens"] == names
    assert any(name.startswith("bytes:\\x") for name in names), "chance text holds bytes that are no character"
    whole = [place for place, name in enumerate(names) if not name.startswith("bytes:")]
    for place in whole:
        offset = told["text_offset"][place]
        if "\ufffd" not in text[: offset + 1]:
            assert text[offset:].startswith(names[place])
    assert told["text_offset"] == sorted(told["text_offset"]) and told["text_offset"][0] == 0


def name_of(real, token):
    data = real.tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def test_a_token_that_is_drawn_stands_beside_the_likeliest(real):
    told = completion(real, temperature=2, seed=1, logprobs=2, max_tokens=40)["choices"][0]["logprobs"]
    sizes = {len(each) for each in told["top_logprobs"]}
    assert sizes == {2, 3}
    for name, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[name] == value and value <= max(top.values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_echo_begins_with_the_prompt_and_its_log_probabilities(real, stream, max_tokens, logprobs):
    answer = completion(real, echo=True, max_tokens=max_tokens, logprobs=logprobs, stream=stream)
    choices = [event["choices"][0] for event in answer] if stream else answer["choices"]
    text = "".join(choice["text"] for choice in choices)
    made, _ = by_engine(real, max_tokens=5)
    assert text == PROMPT + (made if max_tokens else "")
    assert choices[-1]["finish_reason"] == "length"
    if logprobs is None:
        assert all(choice["logprobs"] is None for choice in choices)
        return
    told = {name: [each for choice in choices for each in choice["logprobs"][name]] for name in choices[0]["logprobs"]}
    ids = real.tokenizer.encode(PROMPT)
    assert [len(each) for each in told.values()] == [len(ids) + max_tokens] * 4
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    _, own = by_engine(real, max_tokens=max_tokens, prompt_logprobs=2, logprobs=2)
    scores = [each.logprob for each in own[0].prompt] + [event.token.logprob for event in own if event.token]
    assert told["token_logprobs"][1:] == pytest.approx(scores[1:])
    said = [real.tokenizer.token_bytes(token) for token in ids]
    begun = [b"".join(said[:place]).decode(errors="ignore") for place in range(len(ids))]
    assert told["text_offset"][: len(ids)] == [len(text) for text in begun]


def test_echo_of_ids_is_their_text(real):
    ids = real.tokenizer.encode(PROMPT)
    assert texts(completion(real, prompt=ids, echo=True)) == texts(completion(real, echo=True))


def test_several_prompts_are_continued_each_by_itself(real):
    prompts = [PROMPT, "the dog", "ran 12", "\u732b", "miles", "sat on"] * 2  # more than slots and queue hold
    alone = [texts(completion(real, prompt=prompt))[0] for prompt in prompts]
    answer = completion(real, prompt=prompts)
    assert texts(answer) == alone
    assert [choice["index"] for choice in answer["choices"]] == list(range(12))
    ids = [real.tokenizer.encode(prompt) for prompt in prompts]
    assert texts(completion(real, prompt=ids)) == alone
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 12 * 12
    streamed = completion(real, prompt=prompts, stream=True)
    for index, text in enumerate(alone):
        assert text == "".join(e["choices"][0]["text"] for e in streamed if e["choices"][0]["index"] == index)


def test_choices_are_numbered_prompt_by_prompt_and_the_prompt_counts_once(real):
    asked = {"temperature": 1.2, "seed": 3, "n": 3, "best_of": 3, "max_tokens": 6}
    alone = [completion(real, prompt=prompt, **asked) for prompt in ("the dog", "sat on")]
    answer = completion(real, prompt=["the dog", "sat on"], **asked)
    assert texts(answer) == texts(alone[0]) + texts(alone[1]) and len(set(texts(alone[0]))) == 3
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    tokens = [len(real.tokenizer.encode(prompt)) for prompt in ("the dog", "sat on")]
    assert answer["usage"]["prompt_tokens"] == sum(tokens)
    assert answer["usage"]["total_tokens"] == sum(tokens) + answer["usage"]["completion_tokens"]
    usage = completion(
        real, prompt=["the dog", "sat on"], stream=True, stream_options={"include_usage": True}, **asked
    )[-1]["usage"]
    assert usage == answer["usage"]


def test_without_a_seed_each_request_draws_anew(real):
    drawn = [texts(completion(real, temperature=2, n=2, max_tokens=30)) for _ in range(2)]
    assert len({text for each in drawn for text in each}) == 4


@pytest.mark.parametrize("top", [None, 0, 20])
def test_log_probabilities_of_chat_are_the_engines(real, top):
    asked = {"logprobs": True} | ({} if top is None else {"top_logprobs": top})
    choice = chat(real, **asked)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12 and all(len(each["top_logprobs"]) == (top or 0) for each in content)
    data = b"".join(bytes(each["bytes"] or []) for each in content)
    assert data.decode(errors="replace") == choice["message"]["content"]
    for each in content:
        values = [other["logprob"] for other in each["top_logprobs"]]
        assert each["logprob"] <= 0 and values == sorted(values, reverse=True)
        assert not values or (each["token"], each["logprob"]) == (each["top_logprobs"][0]["token"], values[0])
    streamed = chat(real, stream=True, **asked)
    told = [each for event in streamed for each in event["choices"][0]["logprobs"]["content"]]
    assert told == content
    assert chat(real)["choices"][0]["logprobs"] is None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_schema_is_conformed_to(real, seed, stream):
    import jsonschema

    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked = {"response_format": form, "max_tokens": 200, "temperature": 0 if seed is None else 1, "seed": seed}
    answer = chat(real, stream=stream, **asked)
    if stream:
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in answer)
    else:
        text = answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_json_object_or_plain_text(real):
    bias = {str(real.tokenizer.encode("}")[0]): 30}  # so that it ends
    text = chat(real, response_format={"type": "json_object"}, max_tokens=200, logit_bias=bias)["choices"][0][
        "message"
    ]["content"]
    assert isinstance(json.loads(text), dict)
    plain = [
        chat(real, **asked)["choices"][0]["message"]["content"] for asked in ({}, {"response_format": {"type": "text"}})
    ]
    assert plain[0] == plain[1] != text


def test_a_schema_that_leads_nowhere_is_400_because_clients_repeat_500(real, monkeypatch):
    def fail(match):
        raise RuntimeError("on purpose")

    asked = {"model": "tiny", "messages": CHAT, "response_format": {"type": "json_object"}}
    chat(real, **asked)  # compiled from here on
    monkeypatch.setattr("raymill.inference.grammar._Match.mask", fail)
    with real.http() as http:
        failed = http.post("/v1/chat/completions", json=asked)
    assert failed.status_code == 400, failed.text
    assert failed.json()["error"]["param"] == "response_format"
    assert "simplify the schema" in failed.json()["error"]["message"]
    assert real.engine.stats().healthy


def test_developer_is_system_by_another_name(real):
    said = {}
    for role in ("developer", "system", "user"):
        messages = [{"role": role, "content": "the cat sat"}, *CHAT]
        answer = chat(real, messages=messages)
        said[role] = (answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"])
    assert said["developer"] == said["system"] != said["user"]


def test_an_adapter_is_asked_for_by_its_name(real):
    with real.http() as http:
        models = http.get("/v1/models").json()["data"]
        assert [(model["id"], model["root"], model["parent"]) for model in models] == [
            ("tiny", "tiny", None),
            ("tuned", "tiny", "tiny"),
        ]
        assert http.get("/v1/models/tuned").json() == models[1]
    plain, tuned = (completion(real, model=name, max_tokens=30) for name in ("tiny", "tuned"))
    assert texts(plain) == [by_engine(real, max_tokens=30)[0]]
    assert texts(tuned) == [by_engine(real, max_tokens=30, adapter="tuned")[0]] != texts(plain)
    assert tuned["model"] == "tuned"
    assert chat(real, model="tuned", max_tokens=30)["choices"] != chat(real, max_tokens=30)["choices"]


def test_a_stop_string_ends_each_choice_and_the_end_token_is_told(real):
    text = texts(completion(real, max_tokens=40))[0]
    stop = text[5:8]
    assert texts(completion(real, max_tokens=40, stop=[stop])) == [text[: text.find(stop)]]
    end = real.tokenizer.end_id
    choice = completion(real, logit_bias={str(end): 100}, logprobs=1)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", ["<|endoftext|>"])
    told = chat(real, logit_bias={str(end): 100}, logprobs=True)["choices"][0]
    assert told["logprobs"]["content"][0]["bytes"] is None and told["message"]["content"] == ""


def test_the_model_scores_what_it_says_the_likeliest_at_temperature_zero(real):
    told = completion(real, logprobs=5)["choices"][0]["logprobs"]
    assert np.argmax([list(each.values()) for each in told["top_logprobs"]], axis=1).tolist() == [0] * 12


def test_preemptions_are_scraped(real, monkeypatch):
    monkeypatch.setattr(real.engine._scheduler, "preemptions", real.engine.stats().preemptions + 3)
    with real.http(real.metrics_key) as http:
        text = http.get("/metrics").text
    assert f"raymill_preemptions_total {real.engine.stats().preemptions}.0" in text
