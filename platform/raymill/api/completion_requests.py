"""The body of /v1/completions, and the texts that it and /v1/embeddings take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from raymill.api.bounds import as_whole
from raymill.api.schema import MAX_CHOICES, MAX_COUNT, WHOLE, Generation
from raymill.errors import RequestError

MAX_TEXTS = 256
"""Prompts of one request, or texts to embed."""
MAX_TOP_LOGPROBS = 5

_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_ONE_SCHEMA = [{"type": "string"}, _IDS_SCHEMA]


def texts_or_ids(value: Any) -> list[str | list[int]]:
    """A text, a text's ids, or a list of either, as a list."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    texts = value if several else [value]
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"it has {len(texts)} texts; at most {MAX_TEXTS} are taken")
    if all(isinstance(text, str) for text in texts):
        return texts
    return [_ids(text) for text in texts]


def _ids(text: Any) -> list[int]:
    if not isinstance(text, list) or not text:
        raise ValueError("a text is a string or a list of token ids that is not empty, and all texts are of one kind")
    ids = text if all(type(token) is int for token in text) else [as_whole(token) for token in text]
    if not all(type(token) is int and 0 <= token <= MAX_COUNT for token in ids):
        raise ValueError("a token id is a whole number from 0")
    return ids


Texts = Annotated[
    list[str | list[int]],
    BeforeValidator(texts_or_ids),
    WithJsonSchema(
        {
            "anyOf": [
                *_ONE_SCHEMA,
                *({"type": "array", "items": one, "minItems": 1, "maxItems": MAX_TEXTS} for one in _ONE_SCHEMA),
            ]
        }
    ),
]


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    QUIET: ClassVar[Mapping[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: Texts
    """Text, token ids, or a list of either: each is continued by itself, n times. An empty text is the beginning of a
    document."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT), WHOLE] | None = None
    """Most tokens of a completion; 16 without it."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    """Log probabilities of the tokens, with so many of the likeliest beside each."""
    echo: bool | None = None
    """The text begins with the prompt, and log probabilities with the prompt's."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    """Only n: all that are made are sent."""

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            what = f"best_of is {self.best_of} and n is {self.n or 1}"
            raise RequestError(what, field="best_of", fix="leave it out, or set it to n")
        return self
