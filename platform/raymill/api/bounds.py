"""The bounds of a field: checked before its parts are, and said in words where they are broken."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel

_MAX_VARIANTS = 3
_EXACT = 2**53


def at_most(limit: int, value: Any) -> Any:
    """The value, where it is no list or object of more than `limit` parts: each part that is wrong costs a message."""
    if isinstance(value, list | dict) and len(value) > limit:
        raise ValueError(f"it has {len(value)} parts; at most {limit} are taken")
    return value


def as_whole(value: Any) -> Any:
    """To JSON schemas 5.0 is a whole number; to pydantic it is none. Beyond 2**53 a float may be another number's rounding:
    the parser makes one of -2**63 - 1."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < _EXACT else value


@cache
def takes(model: type[BaseModel], field: str) -> str:
    """What to send as a field, in words."""
    schema = model.model_json_schema()
    property_ = schema["properties"].get(field, {})
    variants = [each for each in property_.get("anyOf", [property_]) if each.get("type") != "null"]
    return "send " + " or ".join(dict.fromkeys(_words(each) for each in variants[:_MAX_VARIANTS]))


def _words(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if kind in ("integer", "number"):
        name = "a whole number" if kind == "integer" else "a number"
        low = f" from {_number(schema['minimum'])}" if "minimum" in schema else ""
        return name + low + (f" to {_number(schema['maximum'])}" if "maximum" in schema else "")
    if kind == "string":
        low = schema.get("minLength", 0)
        return "text" + (f" of {low} to {schema['maxLength']} characters" if "maxLength" in schema else "")
    if kind == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        return "a list" + (f" of {low} to {high} parts" if high is not None else "")
    if kind == "boolean":
        return "true or false"
    return "an object" + (f" of at most {schema['maxProperties']} fields" if "maxProperties" in schema else "")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
