"""What the bodies of all requests share: bounded fields, and the one way from bytes to a checked request.

A body is parsed to plain JSON (no NaN, no half surrogate pairs), its fields are checked against those that are known, then
validated strictly: "5" is not a number and true is not 1. What we do not support is refused by name, never ignored. The
first mistake is answered with 400, its field and its limit, without a look at the rest: a body of mistakes costs no more
than a body of one. null stands for a field that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

import orjson
from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, field_validator, model_validator
from starlette.requests import Request

from raymill.api.bounds import as_whole, at_most, takes
from raymill.config import Config
from raymill.errors import RequestError

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_BIASES = 300
MAX_LABEL_CHARS = 256
MAX_COUNT = 2**31 - 1
SEEDS = (-(2**63), 2**63 - 1)

_ID = re.compile("0|[1-9][0-9]{0,9}")

WHOLE = BeforeValidator(as_whole)
Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stops = Annotated[
    list[Stop],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else at_most(MAX_STOPS, stop)),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}]}),
]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
    BeforeValidator(lambda biases: at_most(MAX_BIASES, biases)),
    Field(json_schema_extra={"maxProperties": MAX_BIASES}),
]


class StreamOptions(Config):
    """What a stream carries beside text."""

    include_usage: bool = False
    """End with a chunk that holds the token counts."""
    include_obfuscation: bool = False
    """Accepted and without effect: there is no padding."""


class Body(Config):
    """The body of a request to a model."""

    QUIET: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's API that are not supported, and the values that ask for nothing; null always does."""

    model: Label
    """Name of the model or of one of its adapters."""
    user: Label | None = None
    """Accepted and without effect."""


class Generation(Body):
    """What requests for text share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    """Completions to make of one prompt; 1 without it."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 takes the likeliest token; 1 without it."""
    top_p: Unit | None = None
    """Draw from the likeliest tokens that hold this share of probability; 1 without it."""
    top_k: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    """Draw from this many likeliest tokens at most. Not in OpenAI's API."""
    min_p: Unit | None = None
    """Draw from tokens at least this many times as likely as the likeliest; 0 without it. Not in OpenAI's API."""
    presence_penalty: Penalty | None = None
    """Taken from the logit of each token that the completion has; 0 without it."""
    frequency_penalty: Penalty | None = None
    """Taken from a token's logit for each time that the completion has it; 0 without it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2, allow_inf_nan=False)] | None = None
    """Logits of tokens in prompt or completion are divided by it, negative ones multiplied; 1 without it. Not in OpenAI's
    API."""
    logit_bias: Biases | None = None
    """What is added to the logits of tokens, by their id."""
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1]), WHOLE] | None = None
    """The same seed gives the same draws; random without it."""
    stop: Stops | None = None
    """The completion ends before the first of these; one string stands for a list of it."""
    stream: bool | None = None
    """Send the text as it is made."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    safety_identifier: Label | None = None
    """Accepted and without effect."""
    prompt_cache_key: Label | None = None
    """Accepted and without effect."""

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token in biases or ():
            if not _ID.fullmatch(token):
                raise ValueError(f"{token[:20]!r} is no token id")
        return biases

    @model_validator(mode="after")
    def _options_are_for_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only for streams", field="stream_options", fix="set stream to true")
        return self


B = TypeVar("B", bound=Body)


async def json_body(request: Request) -> bytes:
    """The body, where it is said to be JSON or nothing is said. RequestError 415 otherwise."""
    kind, _, rest = request.headers.get("content-type", "application/json").partition(";")
    charset = rest.lower().partition("charset=")[2].strip(' "') or "utf-8"
    if kind.strip().lower() != "application/json" or charset not in ("utf-8", "utf8"):
        what = f"the body is {kind.strip()[:MAX_LABEL_CHARS]!r} in {charset[:MAX_LABEL_CHARS]!r}"
        raise RequestError(what, status=415, fix="send Content-Type: application/json, in UTF-8")
    return await request.body()


def parse(model: type[B], body: bytes) -> B:
    """A body as a request. RequestError 400 with the field and what is wrong with it."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", fix="send a JSON object") from None
    if not isinstance(tree, dict):
        raise RequestError("the body is not a JSON object", fix='send {"model": ..., ...}')
    asked = {}
    for name, value in tree.items():
        if name in model.model_fields:
            if value is not None:
                asked[name] = value
        elif name not in model.QUIET:
            shown = name[:MAX_LABEL_CHARS]
            raise RequestError(f"{shown} is not a field of this request", field=shown, fix="leave it out")
        elif value is not None and not any(
            type(value) is type(quiet) and value == quiet for quiet in model.QUIET[name]
        ):
            raise RequestError(f"{name} is not supported here", field=name, fix="leave it out")
    try:
        return model.model_validate(asked, strict=True)
    except ValidationError as error:
        raise _first(error, model) from None


def _first(error: ValidationError, model: type[Body]) -> RequestError:
    """The first mistake of a body, by the name of its field, and what that field takes."""
    detail: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in detail["loc"])[:MAX_LABEL_CHARS]
    field = str(detail["loc"][0])
    if detail["type"] == "missing":
        return RequestError(f"{where} is missing", field=field, fix="add it")
    if detail["type"] == "extra_forbidden":
        return RequestError(f"{where} is not a field here", field=field, fix="leave it out")
    message = detail["msg"].removeprefix("Value error, ")
    what = f"{where}: {message[:1].lower()}{message[1:]}"
    return RequestError(what, field=field, fix=takes(model, field))
