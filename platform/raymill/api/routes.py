"""The HTTP API: OpenAI's models, completions, chat completions and embeddings over an engine, health and metrics.

    create_app(engine, tokenizer, settings, keys, metrics) -> ASGI app

A request passes, from outside in: Recorder (metrics), Guard (key and role), BodyLimit, its route. Everything the API
answers with a status of 400 or more has OpenAI's error shape. There is no page, and no route that is not in `auth.POLICY`.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from raymill import __version__
from raymill.api.auth import Guard
from raymill.api.chat_requests import ChatRequest, ResponseFormat
from raymill.api.completion import Asked, Completion, Head
from raymill.api.completion_requests import CompletionRequest
from raymill.api.context import ContextError
from raymill.api.embeddings import EmbeddingRequest, check_dimensions, embed, embedding_body
from raymill.api.events import EventStream, unless_gone, write_interval_s
from raymill.api.keys import KeyFile
from raymill.api.limits import BodyLimit, Recorder
from raymill.api.logprobs import TokenNames
from raymill.api.openapi import openapi_document
from raymill.api.prompts import Model, ask_chat, ask_completions
from raymill.api.responses import error_response, json_response, renamed
from raymill.api.schema import Generation, json_body, parse
from raymill.config import Config
from raymill.errors import RequestError
from raymill.inference.grammar import Grammar, Grammars
from raymill.inference.json_schema import check_schema
from raymill.inference.requests import Engine, EngineStats
from raymill.inference.step import Floats
from raymill.telemetry.metrics import (
    ACTIVE,
    COMPLETION_TOKENS,
    CONTENT_TYPE,
    FAILED,
    FIRST_TOKEN,
    GONE,
    MEMORY,
    MODEL_INFO,
    PREEMPTIONS,
    PROMPT_TOKENS,
    QUEUED,
    REPLICAS_UP,
    REPLICAS_WANTED,
    SLOTS,
    Metrics,
    resident_bytes,
)
from raymill.tokenizer.chat import Message, render_chat
from raymill.tokenizer.tokenizer import Tokenizer
from raymill.tokenizer.training import IM_END

_CHARS_PER_TOKEN = 32
"""A prompt of more characters than this times the context cannot fit; it is refused before it is encoded."""
_ENCODE_INLINE_CHARS = 4096
_GONE_STATUS = 499
_SHOWN_NAMES = 8
_READ = ["GET", "HEAD"]
T = TypeVar("T")


class ApiSettings(Config):
    """How the API presents one model."""

    model_name: Annotated[str, Field(min_length=1, max_length=128)]
    """The name clients ask for."""
    quantization: str
    """Precision of the weights, for the metrics."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas the job asks for, for the metrics."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024
    """Largest request body."""
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A body must have come whole within this, seconds; else the request is answered 408."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """A completion is given up after this, seconds from the end of its request's body; it is answered 504."""
    stream_interval_ms: Annotated[int, Field(ge=0, le=1000)] = 20
    """Text that is ready is written together, at most once in this time; less often where many streams are open. The first
    token is written at once."""


class Api:
    """The routes' state: one model, its engine, its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ApiSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._created = int(time.time())
        self._token_names = TokenNames(tokenizer)
        self._turn_ends = (tokenizer.end_id, tokenizer.special_id(IM_END))
        self._open_streams = 0
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._document: dict[str, Any] | None = None
        self._dimensions: int | None = None
        info = {"model": settings.model_name, "quantization": settings.quantization, "version": __version__}
        metrics.set(MODEL_INFO, 1, **info)
        metrics.set(REPLICAS_WANTED, settings.replicas)
        record_stats(metrics, engine.stats())

    async def health(self) -> Response:
        stats = self._engine.stats()
        record_stats(self._metrics, stats)
        if not stats.healthy:
            raise RequestError("the engine does not work", status=503, fix="another replica may answer")
        return json_response({"status": "ok"})

    async def scrape(self) -> Response:
        record_stats(self._metrics, self._engine.stats())
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def openapi(self) -> Response:
        if self._document is None:
            self._document = await self._described()
        return json_response(self._document)

    async def _described(self) -> dict[str, Any]:
        """The OpenAPI document."""
        try:
            dimensions = await self._length_of_embeddings()
        except RequestError as error:
            if error.status >= 429:
                raise
            dimensions = None  # this engine makes none
        return openapi_document(self._names, self._engine.max_seq_len, self._engine.vocab_size, dimensions)

    async def _length_of_embeddings(self) -> int:
        """Only an embedding says it; asked for once."""
        if self._dimensions is None:
            self._dimensions = len((await embed(self._engine, [(self._tokenizer.end_id,)], None))[0])
        return self._dimensions

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model(name) for name in self._names]})

    async def model(self, model: str) -> Response:
        self._called(model)
        return json_response(self._model(model))

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await json_body(request))
        model = self._called(asked.model)
        # An empty prompt is the beginning of a document.
        prompts = [ids or (self._tokenizer.end_id,) for ids in await self._ids(asked.prompt, "prompt")]
        completion_id = f"cmpl-{secrets.token_hex(12)}"
        choices = ask_completions(completion_id, asked, prompts, model, frozenset({self._tokenizer.end_id}))
        return await self._complete(request, asked, Head(completion_id, asked.model), choices, sum(map(len, prompts)))

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await json_body(request))
        model = self._called(asked.model)
        turns = [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in asked.messages]
        chars = sum(len(turn.content) for turn in turns)
        ids = tuple(await self._encode(lambda: render_chat(self._tokenizer, turns), [chars], "messages"))
        grammar = await self._grammar(asked.response_format)
        completion_id, stop_ids = f"chatcmpl-{secrets.token_hex(12)}", frozenset(self._turn_ends)
        choices = ask_chat(completion_id, asked, ids, model, stop_ids, grammar)
        return await self._complete(request, asked, Head(completion_id, asked.model), choices, len(ids))

    async def embeddings(self, request: Request) -> Response:
        asked = parse(EmbeddingRequest, await json_body(request))
        model = self._called(asked.model)
        texts = await self._ids(asked.input, "input")
        vectors = await unless_gone(
            request.receive, self._embedded(asked, texts, model.adapter), self._settings.request_timeout_s
        )
        if vectors is None:
            self._metrics.add(GONE, 1)
            return Response(status_code=_GONE_STATUS)
        prompt_tokens = sum(map(len, texts))
        self._metrics.add(PROMPT_TOKENS, prompt_tokens)
        return json_response(embedding_body(asked, vectors, prompt_tokens))

    async def _embedded(
        self, asked: EmbeddingRequest, texts: Sequence[tuple[int, ...]], adapter: str | None
    ) -> list[Floats]:
        """The vectors. RequestError, before any is made, where they cannot be as asked."""
        if asked.dimensions is not None:
            check_dimensions(asked.dimensions, await self._length_of_embeddings())
        with renamed("prompt", "input"):
            return await embed(self._engine, texts, adapter)

    async def _complete(
        self, request: Request, asked: Generation, head: Head, choices: Sequence[Asked], prompt_tokens: int
    ) -> Response:
        began, timeout_s = time.perf_counter(), self._settings.request_timeout_s
        completion = Completion(
            self._engine,
            head,
            choices,
            prompt_tokens,
            stream_usage=asked.stream_options is not None and asked.stream_options.include_usage,
            on_first=lambda: self._metrics.observe(FIRST_TOKEN, time.perf_counter() - began),
        )

        def on_end(gone: bool) -> None:
            completion.close()
            self._open_streams -= len(choices) if asked.stream else 0
            self._metrics.add(GONE, int(gone))
            self._metrics.add(FAILED, int(completion.failed))
            self._metrics.add(PROMPT_TOKENS, completion.usage.prompt_tokens)
            self._metrics.add(COMPLETION_TOKENS, completion.usage.completion_tokens)

        if asked.stream:
            self._open_streams += len(choices)
            every_s = write_interval_s(self._settings.stream_interval_ms / 1000, self._open_streams)
            return EventStream(completion.events(every_s), on_end, timeout_s)
        gone = True
        try:
            body = await unless_gone(request.receive, completion.answer(), timeout_s)
            gone = body is None
        except RequestError:
            gone = False
            raise
        finally:
            on_end(gone)
        return Response(status_code=_GONE_STATUS) if body is None else json_response(body)

    async def _ids(self, texts: Sequence[str | list[int]], field: str) -> list[tuple[int, ...]]:
        """The ids of each text."""
        strings = [text for text in texts if isinstance(text, str)]
        if not strings:
            return [tuple(ids) for ids in texts if not isinstance(ids, str)]
        found = await self._encode(lambda: [*map(self._tokenizer.encode, strings)], [*map(len, strings)], field)
        return [tuple(ids) for ids in found]

    async def _encode(self, encode: Callable[[], T], chars: Sequence[int], field: str) -> T:
        """What `encode` makes of prompts of so many characters each; many are encoded beside the event loop."""
        limit = _CHARS_PER_TOKEN * self._engine.max_seq_len
        if max(chars) > limit:
            what = f"{field} has {max(chars)} characters and the limit is {limit}"
            raise ContextError(what, self._engine.max_seq_len, field=field)
        return encode() if sum(chars) <= _ENCODE_INLINE_CHARS else await asyncio.to_thread(encode)

    async def _grammar(self, form: ResponseFormat | None) -> Grammar | None:
        """What a completion must conform to. A schema compiles for up to 50 ms, beside the event loop."""
        if form is None or form.type == "text":
            return None
        schema: dict[str, Any] = {"type": "object"}
        if form.json_schema is not None and form.json_schema.schema_ is not None:
            schema = form.json_schema.schema_
        return await asyncio.to_thread(self._compile, schema)

    def _compile(self, schema: dict[str, Any]) -> Grammar:
        with self._grammars_lock:
            if self._grammars is None:
                check_schema(schema)  # a wrong one is refused at once, also by a replica that never met a right one
                self._grammars = Grammars(self._tokenizer, self._turn_ends)
        return self._grammars.json_schema(schema)

    @property
    def _names(self) -> tuple[str, ...]:
        return (self._settings.model_name, *self._engine.adapters)

    def _called(self, name: str) -> Model:
        """The model or adapter of that name."""
        if name not in self._names:
            known = ", ".join(repr(each) for each in self._names[:_SHOWN_NAMES])
            raise RequestError(
                f"there is no model {name!r}", field="model", status=404, fix=f"this endpoint serves {known}"
            )
        adapter = None if name == self._settings.model_name else name
        return Model(adapter, self._engine.max_seq_len, self._engine.vocab_size, self._token_names)

    def _model(self, name: str) -> dict[str, object]:
        base = self._settings.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "raymill",
            "root": base,
            "parent": None if name == base else base,
            "max_model_len": self._engine.max_seq_len,
        }


def create_app(engine: Engine, tokenizer: Tokenizer, settings: ApiSettings, keys: KeyFile, metrics: Metrics) -> FastAPI:
    """The app of one replica."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    api = Api(engine, tokenizer, settings, metrics)
    for path, methods, route in (
        ("/health", _READ, api.health),
        ("/metrics", _READ, api.scrape),
        ("/openapi.json", _READ, api.openapi),
        ("/v1/models", _READ, api.models),
        ("/v1/models/{model}", _READ, api.model),
        ("/v1/completions", ["POST"], api.completions),
        ("/v1/chat/completions", ["POST"], api.chat),
        ("/v1/embeddings", ["POST"], api.embeddings),
    ):
        app.add_api_route(path, route, methods=methods, response_model=None)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(Recorder, metrics=metrics)
    return app


def record_stats(metrics: Metrics, stats: EngineStats) -> None:
    """The engine's state and this process's memory into the metrics."""
    metrics.set(QUEUED, stats.queued)
    metrics.set(ACTIVE, stats.active)
    metrics.set(SLOTS, stats.num_slots)
    metrics.set(REPLICAS_UP, int(stats.healthy))
    metrics.raise_to(PREEMPTIONS, stats.preemptions)
    metrics.set(MEMORY, resident_bytes())


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return error_response(error)
    assert isinstance(error, HTTPException)
    fix = "see the API's routes" if error.status_code == 404 else f"allowed: {(error.headers or {}).get('Allow')}"
    refusal = RequestError(str(error.detail).lower(), status=error.status_code, fix=fix)
    response = error_response(refusal)
    response.headers.update(error.headers or {})
    return response


async def _fail(request: Request, error: Exception) -> Response:
    """A bug of ours: the client learns that, the log learns which."""
    return error_response(RequestError("internal error", status=500, fix="tell who runs this endpoint"))
