"""The API's OpenAPI 3.1 document: what each route takes and answers, with the bounds of the model that is served.

The bodies are the settings classes' own JSON schemas, so what is documented is what is checked. Two limits no JSON schema can
say: that prompt and completion together must fit the context, and what a response_format's schema may add up to. Both are
answered 400, the first with a `code` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymill import __version__
from raymill.api.answer_schemas import ANSWERS
from raymill.api.chat_requests import ChatRequest
from raymill.api.completion_requests import CompletionRequest
from raymill.api.embeddings import EmbeddingRequest
from raymill.api.schema import MAX_CHOICES, Body
from raymill.inference.json_schema import (
    ANNOTATIONS,
    FORMATS,
    MAX_DEFINITIONS,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_MULTIPLE,
    MAX_NUMBER,
    MAX_PATTERN_CHARS,
    MAX_PROPERTIES,
    MAX_VALUES,
)
from raymill.inference.requests import MAX_LOGPROBS

Schema = dict[str, Any]

_ERRORS = {
    400: "a field is outside its bounds and `param` names it; `code` is context_length_exceeded where text is too long for the context",
    401: "no key, or one that is not known",
    403: "the key is for something else",
    404: "there is no such model",
    405: "the route takes another method",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not JSON in UTF-8",
    429: "the queue is full; Retry-After says when to try again",
    500: "the model failed",
    503: "this replica does not work, or is shutting down",
    504: "it took too long",
}
_READ_ERRORS = (401, 403, 405, 500)


def openapi_document(models: Sequence[str], max_seq_len: int, vocab_size: int, dimensions: int | None) -> Schema:
    """The document of an endpoint that serves these models and adapters.

    dimensions: of an embedding; None where the engine makes none.
    """
    schemas: Schema = {"JsonSchema": json_schemas(), "JsonConstant": json_constants(), **ANSWERS}
    bounds = _Bounds(list(models), max_seq_len, vocab_size, dimensions)
    paths = {
        "/health": {"get": _get("Whether this replica works", "Health", (*_READ_ERRORS, 503), key=None)},
        "/metrics": {"get": _get("Prometheus' metrics", None, _READ_ERRORS, key="metrics")},
        "/openapi.json": {"get": _get("This document", "Document", _READ_ERRORS)},
        "/v1/models": {"get": _get("The models and adapters", "Models", _READ_ERRORS)},
        "/v1/models/{model}": {
            "parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
            ],
            "get": _get("One model or adapter", "Model", (*_READ_ERRORS, 404)),
        },
        "/v1/completions": {"post": _post(CompletionRequest, "Completion", bounds, schemas)},
        "/v1/chat/completions": {"post": _post(ChatRequest, "ChatCompletion", bounds, schemas)},
        "/v1/embeddings": {"post": _post(EmbeddingRequest, "Embeddings", bounds, schemas)},
    }
    keys = {
        name: {"type": "http", "scheme": "bearer", "description": f"a {name} key"} for name in ("client", "metrics")
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "raymill", "version": __version__, "description": "OpenAI's API over one model."},
        "security": [{"client": []}],
        "paths": paths,
        "components": {"securitySchemes": keys, "schemas": schemas},
    }


class _Bounds:
    """What the served model adds to the bounds of its requests' fields."""

    def __init__(self, models: list[str], max_seq_len: int, vocab_size: int, dimensions: int | None) -> None:
        ids = {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1},
            "minItems": 1,
            "maxItems": max_seq_len,
        }
        self._ids = ids
        length = {"maximum": max_seq_len - 1}
        self._by_field: dict[str, Schema] = {
            "model": {"enum": models},
            "dimensions": {"enum": [dimensions]},
            "max_tokens": length,
            "max_completion_tokens": length,
            "top_logprobs": {"maximum": min(MAX_LOGPROBS, vocab_size)},
            "logit_bias": {"propertyNames": {"pattern": whole_numbers_below(vocab_size)}},
        }

    def narrow(self, properties: Schema) -> None:
        """Puts the model's bounds into the fields' schemas."""
        for field, bound in self._by_field.items():
            for variant in properties.get(field, {}).get("anyOf", [properties.get(field, {})]):
                if variant.get("type") != "null":
                    variant.update(bound)
        for field in {"prompt", "input"} & properties.keys():
            shortest = int(field == "input")
            text = {"type": "string", "minLength": shortest}
            properties[field]["anyOf"] = [
                text,
                self._ids,
                *(
                    {**variant, "items": each}
                    for variant, each in zip(properties[field]["anyOf"][2:], (text, self._ids), strict=True)
                ),
            ]


def json_schemas() -> Schema:
    """The JSON schemas that a response_format may hold: every keyword that is enforced, and those that only explain."""
    each = {"$ref": "#/components/schemas/JsonSchema"}
    constant = {"$ref": "#/components/schemas/JsonConstant"}
    named = {"type": "object", "additionalProperties": each}
    definitions = {**named, "maxProperties": MAX_DEFINITIONS}
    several = {"type": "array", "items": each, "minItems": 1}
    count = {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH}
    number = {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
    kind = {"enum": ["string", "number", "integer", "boolean", "null", "array", "object"]}
    return {
        "description": "A JSON schema whose every keyword is enforced. Values that conform must exist, and "
        f"all of it is bounded: {MAX_VALUES} schemas and constants, {MAX_PROPERTIES} properties, {MAX_DEPTH} levels.",
        "type": ["object", "boolean"],
        "additionalProperties": False,
        "properties": {
            "type": {"anyOf": [kind, {"type": "array", "items": kind, "minItems": 1, "uniqueItems": True}]},
            "enum": {"type": "array", "items": constant, "minItems": 1},
            "const": constant,
            "properties": named,
            "required": {"type": "array", "items": {"type": "string"}},
            "minProperties": {"enum": [0, 1]},
            "format": {"enum": list(FORMATS)},
            "pattern": {"type": "string", "maxLength": MAX_PATTERN_CHARS, "description": "A regular expression."},
            "multipleOf": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": MAX_MULTIPLE,
                "description": f"At most {MAX_MULTIPLE} units of its last decimal.",
            },
            "$ref": {"type": "string", "description": "# or #/$defs/ and a name."},
            **dict.fromkeys(("$defs", "definitions"), definitions),
            **dict.fromkeys(("items", "additionalProperties"), each),
            **dict.fromkeys(("prefixItems", "anyOf", "oneOf", "allOf"), several),
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "maxProperties"), count),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), number),
            **dict.fromkeys(sorted(ANNOTATIONS), constant),
        },
    }


def json_constants() -> Schema:
    """The values that a JSON schema may name."""
    each = {"$ref": "#/components/schemas/JsonConstant"}
    return {
        "anyOf": [
            {"type": ["string", "boolean", "null"]},
            {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
            {"type": "array", "items": each},
            {"type": "object", "additionalProperties": each},
        ]
    }


def whole_numbers_below(limit: int) -> str:
    """A pattern of the numbers from 0 to limit - 1, written without leading zeros."""
    last = str(limit - 1)
    shorter = [f"[1-9]{'[0-9]' * (size - 1)}" for size in range(1, len(last))]
    parts = ["0", *shorter]
    for place, digit in enumerate(last):
        low = 0 if place else 1
        if int(digit) > low:
            parts.append(f"{last[:place]}[{low}-{int(digit) - 1}]{'[0-9]' * (len(last) - place - 1)}")
    return f"^({'|'.join([*parts, last])})$"


def _get(summary: str, answer: str | None, errors: Sequence[int], key: str | None = "client") -> Schema:
    content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    security: list[Schema] = [] if key is None else [{key: []}]
    return {"summary": summary, "security": security, "responses": _responses(content, errors)}


def _post(model: type[Body], answer: str, bounds: _Bounds, schemas: Schema) -> Schema:
    """A route that takes a body; the body's schema goes into `schemas`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    properties = schema["properties"]
    bounds.narrow(properties)
    for field, quiet in model.QUIET.items():
        properties[field] = {"description": "Not supported.", "enum": [*quiet, None]}
    related = [{"anyOf": each} for each in _RELATED.get(model, [])]
    parts = schema.pop("$defs", {})
    if "NamedSchema" in parts:
        variants = parts["NamedSchema"]["properties"]["schema"]["anyOf"]
        variants[0] = {"allOf": [{"$ref": "#/components/schemas/JsonSchema"}, {"type": "object"}]}
        parts["ResponseFormat"]["anyOf"] = _FORMATS
    schemas |= _plain(parts)
    schemas[model.__name__] = _plain(schema | ({"allOf": related} if related else {}))
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    content: Schema = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    if "stream" in properties:
        content["text/event-stream"] = {"schema": _EVENT}
    return {
        "summary": (model.__doc__ or "").strip(),
        "requestBody": {"required": True, "content": body},
        "responses": _responses(content, tuple(_ERRORS)),
    }


def _plain(schema: Any) -> Any:
    """Without the titles and defaults that say nothing."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    dull = {name for name in ("title", "default") if not isinstance(schema.get(name, {}), dict)}
    return {name: _plain(value) for name, value in schema.items() if name not in dull}


def _responses(content: Schema, errors: Sequence[int]) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: Schema = {"200": {"description": "The answer", "content": content}}
    for status in errors:
        found[str(status)] = {"description": _ERRORS[status], "content": error}
    return found


_EVENT: Schema = {
    "description": "Server-sent events: `data` is a JSON object as the answer's, with a part of each choice; the last is [DONE].",
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


def _has(field: str, value: Schema) -> Schema:
    return {"properties": {field: value}, "required": [field]}


def _lacks(field: str) -> Schema:
    return {"properties": {field: {"type": "null"}}}


_STREAMED = [_lacks("stream_options"), _has("stream", {"const": True})]
_BEST = [
    _lacks("best_of"),
    {"properties": {"best_of": {"const": 1}, "n": {"enum": [1, None]}}},
    *(
        {"properties": {"best_of": {"const": n}, "n": {"const": n}}, "required": ["n"]}
        for n in range(2, MAX_CHOICES + 1)
    ),
]
_TOP = [{"properties": {"top_logprobs": {"enum": [0, None]}}}, _has("logprobs", {"const": True})]
_RELATED: dict[type[Body], list[list[Schema]]] = {
    CompletionRequest: [_STREAMED, _BEST],
    ChatRequest: [_STREAMED, _TOP],
}
"""Of each list one must hold: fields that ask for one another."""
_FORMATS = [
    {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
    {"properties": {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}}, "required": ["json_schema"]},
]
