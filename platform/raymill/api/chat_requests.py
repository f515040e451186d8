"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from raymill.api.bounds import at_most
from raymill.api.schema import MAX_COUNT, WHOLE, Generation
from raymill.config import Config
from raymill.errors import RequestError
from raymill.inference.requests import MAX_LOGPROBS

MAX_MESSAGES = 256
_MAX_FIELDS = 16


class _Small(Config):
    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        return at_most(_MAX_FIELDS, value)


class TextPart(_Small):
    """A piece of a message."""

    type: Literal["text"]
    """Only text is understood."""
    text: str
    """The piece."""


Content = Annotated[
    list[TextPart],
    BeforeValidator(
        lambda content: (
            [{"type": "text", "text": content}] if isinstance(content, str) else at_most(MAX_MESSAGES, content)
        )
    ),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": TextPart.model_json_schema(), "maxItems": MAX_MESSAGES},
            ]
        }
    ),
]


class ChatMessage(_Small):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; developer is system by another name."""
    content: Content
    """What was said; one string stands for a list of one part."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class NamedSchema(_Small):
    """A JSON schema and what it is called."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    """Letters, digits, _ and -."""
    description: Annotated[str, Field(max_length=4096)] | None = None
    """Accepted and without effect: the model does not read it."""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """Any JSON object without it."""
    strict: bool | None = None
    """Accepted and without effect: a schema is always enforced."""


class ResponseFormat(_Small):
    """What the completion must conform to."""

    type: Literal["text", "json_object", "json_schema"]
    """text: nothing; json_object: any JSON object; json_schema: `json_schema`."""
    json_schema: NamedSchema | None = None
    """Only with that type."""


Messages = Annotated[
    list[ChatMessage],
    BeforeValidator(lambda messages: at_most(MAX_MESSAGES, messages)),
    Field(min_length=1, max_length=MAX_MESSAGES),
]


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    QUIET: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Messages
    """The conversation so far."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    """Most tokens of a completion; all that the context has room for without it."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    """max_tokens by its newer name; it goes first."""
    logprobs: bool | None = None
    """Give the log probabilities of the tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    """So many of the likeliest tokens beside each; only with logprobs."""
    response_format: ResponseFormat | None = None
    """What the completion must conform to."""

    @model_validator(mode="after")
    def _related(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only for logprobs", field="top_logprobs", fix="set logprobs to true")
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            what = f"response_format is {form.type} {'with' if form.json_schema else 'without'} json_schema"
            raise RequestError(
                what, field="response_format", fix="send json_schema with type json_schema, and only then"
            )
        return self

    @property
    def length_field(self) -> str:
        """The field that bounds the completion's length."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
