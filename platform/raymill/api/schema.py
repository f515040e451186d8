"""OpenAI's requests as typed, bounded settings; what we do not support is refused by name, never ignored.

A body is parsed to plain JSON (no NaN, no duplicates of meaning), checked against the table of known but unsupported
fields, then validated strictly: "5" is not a number and true is not 1. The first mistake is answered with 400, its field
and its limit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import Field, ValidationError, field_validator

from raymill.config import Config
from raymill.errors import RequestError

MAX_CHOICES = 4
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_MESSAGES = 256
MAX_LABEL_CHARS = 256
_MAX_COUNT = 2**31 - 1

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]

_NOOP: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that are not supported, and the values that ask for nothing; null always does."""


class StreamOptions(Config):
    """What a stream carries beside text."""

    include_usage: bool = False
    """End with a chunk that holds the token counts."""
    include_obfuscation: bool = False
    """Accepted and without effect: there is no padding."""


class _Common(Config):
    """What both kinds of request share."""

    model: Label
    """Name of the model; must be the one served."""
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    """Most tokens of the completion."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Completions to make of one prompt; 1 without it."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 takes the likeliest token; 1 without it."""
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Draw from the likeliest tokens that hold this share of probability; 1 without it."""
    top_k: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    """Draw from this many likeliest tokens at most. Not in OpenAI's API."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed gives the same draws; random without it."""
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    """The completion ends before the first of these; one string stands for a list of it."""
    stream: bool | None = None
    """Send the text as it is made."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    user: Label | None = None
    """Accepted and without effect."""
    safety_identifier: Label | None = None
    """Accepted and without effect."""
    prompt_cache_key: Label | None = None
    """Accepted and without effect."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


class CompletionRequest(_Common):
    """The body of /v1/completions."""

    prompt: Any
    """Text (str), token ids (list[int]), or a list that holds one of them."""

    @field_validator("prompt")
    @classmethod
    def _text_or_ids(cls, prompt: Any) -> str | list[int]:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) != 1:
                raise ValueError("a request takes one prompt; send one request for each")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and all(type(token) is int and 0 <= token <= _MAX_COUNT for token in prompt):
            return prompt
        raise ValueError("a prompt is a string or a list of token ids")


class TextPart(Config):
    """A piece of a message."""

    type: Literal["text"]
    """Only text is understood."""
    text: str
    """The piece."""


class ChatMessage(Config):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; developer is system by another name."""
    content: Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    """What was said; one string stands for a list of one part."""

    @field_validator("content", mode="before")
    @classmethod
    def _one_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    """max_tokens by its newer name."""


R = TypeVar("R", CompletionRequest, ChatRequest)


def parse(model: type[R], body: bytes) -> R:
    """A body as a request. RequestError 400 with the field and what is wrong with it."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", fix="send a JSON object") from None
    if not isinstance(tree, dict):
        raise RequestError("the body is not a JSON object", fix='send {"model": ..., ...}')
    asked = {name: value for name, value in tree.items() if value is not None}
    for name in asked.keys() & (_NOOP.keys() - model.model_fields.keys()):
        if not any(type(asked[name]) in (type(noop), float) and asked[name] == noop for noop in _NOOP[name]):
            raise RequestError(f"{name} is not supported here", field=name, fix="leave it out")
        del asked[name]
    try:
        request = model.model_validate(asked, strict=True)
    except ValidationError as error:
        raise _first(error) from None
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for streams", field="stream_options", fix="set stream to true")
    return request


def _first(error: ValidationError) -> RequestError:
    """The first mistake of a body, by the name of its field."""
    detail = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in detail["loc"])[:MAX_LABEL_CHARS]
    field = str(detail["loc"][0])[:MAX_LABEL_CHARS]
    if detail["type"] == "extra_forbidden":
        return RequestError(f"{where} is not a field of this request", field=field, fix="leave it out")
    if detail["type"] == "missing":
        return RequestError(f"{where} is missing", field=field, fix="add it")
    message = detail["msg"].removeprefix("Value error, ")
    return RequestError(f"{where}: {message[:1].lower()}{message[1:]}", field=field)
