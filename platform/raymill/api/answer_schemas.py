"""The JSON schemas of what the API answers."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _exactly(**properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NATS: Schema = {"type": "number", "maximum": 0}
_REASON: Schema = {"enum": ["stop", "length"]}
_BYTES = _or_null(_list({"type": "integer", "minimum": 0, "maximum": 255}))
_ENTRY = {"token": _TEXT, "logprob": _NATS, "bytes": _BYTES}
_TOP = {"type": "object", "additionalProperties": _NATS}
_USAGE = _exactly(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_MODEL = _exactly(
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    root=_TEXT,
    parent=_or_null(_TEXT),
    max_model_len=_COUNT,
)
_TEXT_CHOICE = _exactly(
    index=_COUNT,
    text=_TEXT,
    logprobs=_or_null(
        _exactly(
            tokens=_list(_TEXT),
            token_logprobs=_list(_or_null(_NATS)),
            top_logprobs=_list(_or_null(_TOP)),
            text_offset=_list(_COUNT),
        )
    ),
    finish_reason=_REASON,
)
_CHAT_CHOICE = _exactly(
    index=_COUNT,
    message=_exactly(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"}),
    logprobs=_or_null(
        _exactly(content=_list(_exactly(**_ENTRY, top_logprobs=_list(_exactly(**_ENTRY)))), refusal={"type": "null"})
    ),
    finish_reason=_REASON,
)
_VECTOR: Schema = {"anyOf": [_list({"type": "number"}), {"type": "string", "contentEncoding": "base64"}]}


def _answer(kind: str, choice: Schema) -> Schema:
    return _exactly(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_list(choice), usage=_USAGE)


ANSWERS: dict[str, Schema] = {
    "Error": _exactly(error=_exactly(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
    "Health": _exactly(status={"const": "ok"}),
    "Document": {"type": "object"},
    "Model": _MODEL,
    "Models": _exactly(object={"const": "list"}, data=_list(_MODEL)),
    "Completion": _answer("text_completion", _TEXT_CHOICE),
    "ChatCompletion": _answer("chat.completion", _CHAT_CHOICE),
    "Embeddings": _exactly(
        object={"const": "list"},
        data=_list(_exactly(object={"const": "embedding"}, index=_COUNT, embedding=_VECTOR)),
        model=_TEXT,
        usage=_exactly(prompt_tokens=_COUNT, total_tokens=_COUNT),
    ),
}
"""By the name they have in the OpenAPI document."""
