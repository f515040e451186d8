"""Clients that others wrote work unchanged, each where it is installed: openai, litellm, lm-eval's local-completions."""

import asyncio
import json

import numpy as np
import openai
import pytest

MESSAGES = [{"role": "user", "content": "the dog?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=real.client_key, max_retries=0) as client:
        yield client


def test_openai_models_and_completions(client, real):
    assert {model.id: model.parent for model in client.models.list()} == {"tiny": None, "tuned": "tiny"}
    asked = {
        "model": "tiny",
        "prompt": ["the dog", "A cat"],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 3,
        "echo": True,
    }
    made = client.completions.create(**asked, n=2, best_of=2, seed=1, presence_penalty=0.5, extra_body={"min_p": 0.1})
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text[:5] for choice in made.choices] == ["the d", "the d", "A cat", "A cat"]
    told = made.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert made.usage.completion_tokens == 32
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(p.choices[0].text for p in pieces if p.choices and p.choices[0].index == i) for i in range(2)]
    plain = client.completions.create(**asked)
    assert texts == [choice.text for choice in plain.choices]
    assert pieces[-1].usage == plain.usage and pieces[0].usage is None


def test_openai_chat(client):
    asked = {"model": "tuned", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
    talk = client.chat.completions.create(
        **asked, logprobs=True, top_logprobs=2, n=2, stop=["zzz"], logit_bias={"70": -100}
    )
    assert [len(choice.logprobs.content) for choice in talk.choices] == [8, 8]
    assert len(talk.choices[0].logprobs.content[0].top_logprobs) == 2
    assert talk.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}, logprobs=True)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**asked).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)
    with client.chat.completions.stream(**asked) as events:
        assert "".join(event.delta for event in events if event.type == "content.delta") == text


def test_openai_parses_a_schemas_answer(client):
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=8)
        age: int = Field(ge=0, le=150)

    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    parsed = client.chat.completions.parse(**asked, response_format=Person).choices[0].message.parsed
    assert isinstance(parsed, Person) and 0 <= parsed.age <= 150


def test_openai_embeddings(client, real):
    for form in (openai.NOT_GIVEN, "float", "base64"):  # the package asks for base64 by itself
        made = client.embeddings.create(model="tiny", input=["the dog", "A cat"], encoding_format=form)
        first = made.data[0].embedding
        if isinstance(first, str):
            continue
        own = real.engine.embed(tuple(real.tokenizer.encode("the dog"))).result()
        assert np.array_equal(np.float32(first), own)


def test_openai_asynchronously(real):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key=real.client_key, max_retries=0) as client:
            asked = {"model": "tiny", "prompt": "the dog", "max_tokens": 8, "temperature": 0}
            made = await asyncio.gather(*(client.completions.create(**asked) for _ in range(4)))
            return {each.choices[0].text for each in made}

    assert len(asyncio.run(ask())) == 1


def test_openai_names_what_is_wrong(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x", logprobs=6)
    assert refused.value.param == "logprobs" and "from 0 to 5" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x", max_tokens=256)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.mark.filterwarnings("ignore")
def test_litellm(real, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{real.url}/v1", "api_key": real.client_key, "num_retries": 0}
    asked = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, **where}
    with real.http() as http:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        own = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    talk = litellm.completion(model="openai/tiny", **asked, logprobs=True, top_logprobs=2, n=2, seed=1)
    assert [choice.message.content for choice in talk.choices] == [own, own]
    assert len(talk.choices[0].logprobs.content) == 8 and talk.usage.completion_tokens == 16
    chunks = list(litellm.completion(model="openai/tiny", **asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == own
    assert chunks[-1].usage.completion_tokens == 8
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    made = litellm.completion(model="openai/tiny", **{**asked, "max_tokens": 200}, response_format=form)
    assert json.loads(made.choices[0].message.content).keys() == {"name", "age"}
    text = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="the dog", max_tokens=8, temperature=0, logprobs=2, **where
    )
    assert len(text.choices[0].logprobs.tokens) == 8
    vectors = litellm.embedding(model="openai/tiny", input=["the dog", "A cat"], **where)
    assert len(vectors.data) == 2 and len(vectors.data[0]["embedding"]) == 64
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model="openai/tiny", **{**asked, "temperature": 3})
    with pytest.raises(litellm.ContextWindowExceededError):  # for which litellm may ask another model
        litellm.completion(model="openai/tiny", **{**asked, "max_tokens": 255})


PIECES, CONTEXT_TOKENS, ITEM_TOKENS = 24, 32, 48


@pytest.fixture
def harness(letters_checkpoint, tmp_path, monkeypatch):
    """(lm_eval, a function that runs a task of ours on the server)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((letters_checkpoint / "tokenizer.json").read_bytes())
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))

    def run(served, rows, **task):
        monkeypatch.setenv("OPENAI_API_KEY", served.client_key)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
        config = {"task": "ours", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (tmp_path / "ours.yaml").write_text(json.dumps(config))
        arguments = {
            "model": "tiny",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tokenizer),
            "max_length": 256,
            "num_concurrent": 1,
            "max_retries": 1,
        }
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=["ours"],
            task_manager=manager,
            batch_size=4,
            bootstrap_iters=0,
        )

    return run


def stream_of(folder, ids, end_id):
    from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream

    np.asarray(ids, dtype="<u2").tofile(folder / "val-00000.bin")
    entry = ShardEntry(path="val-00000.bin", split="val", documents=1, tokens=len(ids), text_bytes=len(ids))
    index = ShardIndex(dtype="uint16", vocab_size=259, end_of_document_id=end_id, shards=(entry,))
    (folder / INDEX).write_text(index.model_dump_json())
    return TokenStream(folder, "val")


@pytest.fixture
def forward(letters_checkpoint):
    from raymill.model.weights import load_model

    model = load_model(letters_checkpoint).eval()
    return lambda ids_BT, documents_BT: model(ids_BT, documents_BT)


def sentences(count, length):
    """Pieces of chance text, each of `length` bytes that are ids of their own."""
    random = np.random.default_rng(7)
    letters = list("abcdefgh ijklm nopq rst uvwxyz,.;")
    return ["".join(random.choice(letters, length - 2)) + "ab" for _ in range(count)]


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_our_perplexity(letters, harness, forward, tmp_path):
    from raymill.evaluation.perplexity import evaluate_stream

    end_id, texts = letters.tokenizer.end_id, sentences(5, 200)
    found = harness(
        letters,
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("byte_perplexity", "bits_per_byte")],
    )["results"]["ours"]
    nats = []
    for number, text in enumerate(texts):  # each after the end of a document, as lm-eval reads it
        folder = tmp_path / str(number)
        folder.mkdir()
        stream = stream_of(folder, [end_id, *letters.tokenizer.encode(text)], end_id)
        nats.append(evaluate_stream(forward, stream, seq_len=256, max_sequences=None, batch_size=1).loss_nats)
    print(f"perplexity: lm-eval {found['byte_perplexity,none']:.6f}, ours {np.exp(np.mean(nats)):.6f}")
    assert found["byte_perplexity,none"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert found["bits_per_byte,none"] == pytest.approx(np.mean(nats) / np.log(2), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_our_share_of_right_choices(letters, harness, forward, tmp_path):
    from raymill.evaluation.continuation import OPTIONS, choose_continuations

    pieces = sentences(PIECES, ITEM_TOKENS)
    ids = [token for piece in pieces for token in letters.tokenizer.encode(piece)]
    assert len(ids) == PIECES * ITEM_TOKENS
    own = choose_continuations(
        forward, stream_of(tmp_path, ids, letters.tokenizer.end_id), max_items=PIECES, max_seq_len=256
    )
    rows = []
    for number, piece in enumerate(pieces):
        others = [number, *((number + step * PIECES // OPTIONS) % PIECES for step in range(1, OPTIONS))]
        rows.append(
            {
                "context": piece[:CONTEXT_TOKENS],
                "options": [pieces[other][CONTEXT_TOKENS:] for other in others],
                "right": 0,
            }
        )
    found = harness(
        letters,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="{{options}}",
        doc_to_target="{{right}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )["results"]["ours"]
    print(f"multiple choice: lm-eval {found['acc,none']:.6f}, ours {own.accuracy:.6f}, {own.items} items")
    assert own.items == PIECES and 0 < own.accuracy < 1
    assert found["acc,none"] == pytest.approx(own.accuracy, abs=1e-4)
