"""What the OpenAPI document cannot say, told to schemathesis: that prompt and completion together fit the model's context, and
what some keywords of a response_format's schema may be.

    SCHEMATHESIS_HOOKS=tests/api/schemathesis_hooks.py st run URL/openapi.json -H "Authorization: Bearer KEY" -n 500

A JSON schema neither counts tokens nor adds fields up. Valid bodies that might be too long for the context are left out here, a
token being at least a byte of UTF-8; so are, of a response_format's schema, the keywords that are bounded together, and bodies
larger than a replica reads. Every other body must be accepted or refused as documented.
"""

from __future__ import annotations

import json

import schemathesis

_TURN_TOKENS = 16
"""More than a chat template writes around a message, or before the answer."""

_MAX_BODY_BYTES = 256 * 1024
_BOUNDED_TOGETHER = {"pattern", "multipleOf", "$ref", "oneOf", "allOf"}


@schemathesis.hook
def filter_case(context, case):
    """Whether the body is read, and prompt and completion fit the context for certain where it is meant to be valid."""
    body = case.body
    if isinstance(body, dict | list) and len(json.dumps(body)) > _MAX_BODY_BYTES:
        return False
    if not isinstance(body, dict) or not case.meta.generation.mode.is_positive:
        return True
    length = max(1, body.get("max_tokens") or 0, body.get("max_completion_tokens") or 0)
    return most_tokens(body) + length <= context_of(case.operation.schema.raw_schema)


@schemathesis.hook
def map_case(context, case):
    """The case with plainer schemas, where it is meant to be valid."""
    if isinstance(case.body, dict) and case.meta.generation.mode.is_positive:
        form = case.body.get("response_format") or {}
        named = form.get("json_schema") or {}
        if "schema" in named:
            form = {**form, "json_schema": {**named, "schema": plainer(named["schema"])}}
            case.body = {**case.body, "response_format": form}
    return case


def plainer(schema):
    """The schema without what is bounded together."""
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in ("items", "additionalProperties"):
            kept[key] = plainer(value)
        elif key in ("anyOf", "prefixItems"):
            kept[key] = [plainer(each) for each in value]
        elif key in ("properties", "$defs", "definitions"):
            kept[key] = {name: plainer(each) for name, each in value.items()}
        elif key not in _BOUNDED_TOGETHER:
            kept[key] = value
    return kept


def most_tokens(body):
    """Tokens that the longest prompt of a body has at most."""
    texts = [text for field in ("prompt", "input", "messages") for text in texts_of(body.get(field))]
    counts = [max(1, len(text.encode())) if isinstance(text, str) else len(text) for text in texts]
    return sum(counts, _TURN_TOKENS) if "messages" in body else max(counts)


def context_of(document):
    """The context's tokens, from the bounds of max_tokens."""
    variants = document["components"]["schemas"]["CompletionRequest"]["properties"]["max_tokens"]["anyOf"]
    return 1 + next(each["maximum"] for each in variants if each["type"] == "integer")


def texts_of(value):
    """Each text of a prompt, an input or messages: a string, or a list of ids."""
    if isinstance(value, dict):
        return [*texts_of(value.get("content", value.get("text"))), [0] * _TURN_TOKENS]
    if isinstance(value, list) and not all(isinstance(each, int | float) for each in value):
        return [text for each in value for text in texts_of(each)]
    return [] if value is None else [value]
