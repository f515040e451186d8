"""The HTTP API: OpenAI's models, completions and chat completions over an engine, health and metrics.

    create_app(engine, tokenizer, settings, keys, metrics) -> ASGI app

A request passes, from outside in: Recorder (metrics), Guard (key and role), BodyLimit, its route. Everything the API
answers with a status of 400 or more has OpenAI's error shape. There is no page, no schema and no route that is not in
`auth.POLICY`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from raymill import __version__
from raymill.api.auth import Guard
from raymill.api.completion import Completion, EventStream, Prompt, unless_gone
from raymill.api.keys import KeyFile
from raymill.api.limits import BodyLimit, Recorder
from raymill.api.responses import error_response, json_response
from raymill.api.schema import ChatRequest, CompletionRequest, parse
from raymill.config import Config
from raymill.errors import RequestError
from raymill.inference.requests import Engine, EngineStats
from raymill.telemetry.metrics import (
    ACTIVE,
    COMPLETION_TOKENS,
    CONTENT_TYPE,
    FAILED,
    FIRST_TOKEN,
    GONE,
    MEMORY,
    MODEL_INFO,
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
_DEFAULT_MAX_TOKENS = 16
_GONE_STATUS = 499


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
    """Text that is ready is written together, at most once in this time; the first token at once."""


class Api:
    """The routes' state: one model, its engine, its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ApiSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._created = int(time.time())
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

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, model_id: str) -> Response:
        self._check_model(model_id)
        return json_response(self._model())

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        self._check_model(asked.model)
        ids = asked.prompt
        if isinstance(ids, str):
            # An empty prompt is the beginning of a document.
            text = ids
            ids = await self._encode(lambda: self._tokenizer.encode(text), len(text), "prompt")
            ids = ids or [self._tokenizer.end_id]
        stops = frozenset({self._tokenizer.end_id})
        return await self._complete(request, asked, Prompt(tuple(ids), stops, "prompt", _DEFAULT_MAX_TOKENS))

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        self._check_model(asked.model)
        turns = [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in asked.messages]
        size = sum(len(turn.content) for turn in turns)
        ids = await self._encode(lambda: render_chat(self._tokenizer, turns), size, "messages")
        stops = frozenset({self._tokenizer.end_id, self._tokenizer.special_id(IM_END)})
        return await self._complete(request, asked, Prompt(tuple(ids), stops, "messages", self._engine.max_seq_len))

    async def _complete(self, request: Request, asked: CompletionRequest | ChatRequest, prompt: Prompt) -> Response:
        began, timeout_s = time.perf_counter(), self._settings.request_timeout_s
        completion = Completion(self._engine, asked, prompt)

        def on_first() -> None:
            self._metrics.observe(FIRST_TOKEN, time.perf_counter() - began)

        def on_end(gone: bool) -> None:
            completion.close()
            self._metrics.add(GONE, int(gone))
            self._metrics.add(FAILED, int(completion.failed))
            self._metrics.add(PROMPT_TOKENS, completion.usage.prompt_tokens)
            self._metrics.add(COMPLETION_TOKENS, completion.usage.completion_tokens)

        if asked.stream:
            events = completion.events(self._settings.stream_interval_ms / 1000, on_first)
            return EventStream(events, on_end, timeout_s)
        gone = True
        try:
            body = await unless_gone(request.receive, completion.answer(on_first), timeout_s)
            gone = body is None
        except RequestError:
            gone = False
            raise
        finally:
            on_end(gone)
        return Response(status_code=_GONE_STATUS) if body is None else json_response(body)

    async def _encode(self, encode: Callable[[], list[int]], size: int, field: str) -> list[int]:
        """The ids of a text of `size` characters; a long one is encoded beside the event loop."""
        limit = _CHARS_PER_TOKEN * self._engine.max_seq_len
        if size > limit:
            raise RequestError(f"{field} has {size} characters; the limit is {limit}", field=field, fix="shorten it")
        return encode() if size <= _ENCODE_INLINE_CHARS else await asyncio.to_thread(encode)

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            fix = f"this endpoint serves {self._settings.model_name!r}"
            raise RequestError(f"there is no model {name!r}", field="model", status=404, fix=fix)

    def _model(self) -> dict[str, object]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "raymill",
            "max_model_len": self._engine.max_seq_len,
        }


def create_app(engine: Engine, tokenizer: Tokenizer, settings: ApiSettings, keys: KeyFile, metrics: Metrics) -> FastAPI:
    """The app of one replica."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    api = Api(engine, tokenizer, settings, metrics)
    for path, method, route in (
        ("/health", "GET", api.health),
        ("/metrics", "GET", api.scrape),
        ("/v1/models", "GET", api.models),
        ("/v1/models/{model_id}", "GET", api.model),
        ("/v1/completions", "POST", api.completions),
        ("/v1/chat/completions", "POST", api.chat),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)
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
