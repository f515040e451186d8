"""What a schema may ask for: only keywords that are enforced, within bounds that keep compiling it below some 50 ms.

A schema comes from a stranger. Nothing is compiled before `check_schema` has walked it: a keyword that is not known here is
refused, never ignored, and so is what compiles or follows in exponential time. Every refusal is a RequestError (400) on the
field response_format that names the limit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from raymill.errors import RequestError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_VALUES = 1_000
"""Schemas, enum members and values in constants."""
MAX_PROPERTIES = 200
MAX_LENGTH = 10_000
"""Of minLength, maxLength, minItems, maxItems, maxProperties."""
MAX_PATTERNS = 32
MAX_MERGED_PATTERNS = 2
"""Patterns and formats of a schema whose parts are merged: their intersections are costly."""
MAX_PATTERN_CHARS = 256
MAX_REPEATS = 256
"""Product of a pattern's counted repetitions."""
MAX_RANGES = 50
"""minimum, maximum, exclusiveMinimum, exclusiveMaximum in all."""
MAX_MULTIPLE = 1_000
"""Least common multiple of all multipleOf, in units of their last decimal."""
MAX_ALTERNATIVES = 256
"""Of anyOf, oneOf and all that they lead to without a property or an item between."""
MAX_BRANCHES = 16
"""The same where allOf, $ref and siblings of anyOf multiply them."""
MAX_DEFINITIONS = 64
MAX_NUMBER = 2**53

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")

ANNOTATIONS = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
}
"""Keywords that constrain nothing."""
_LENGTHS = {"minLength", "maxLength", "minItems", "maxItems", "maxProperties"}
_RANGES = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_ONE = {"items", "additionalProperties"}  # a schema
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_DEFINITIONS = ("$defs", "definitions")
_MAPS = {"properties", *_DEFINITIONS}
_PLAIN = {"type", "enum", "const", "required", "minProperties", "multipleOf", "pattern", "format", "$ref"}
_KNOWN = ANNOTATIONS | _LENGTHS | _RANGES | _ONE | _LISTS | _MAPS | _PLAIN
_MERGING = {"allOf", "anyOf", "oneOf", "$ref"}
_REPEATS = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_DEFINITION = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")

Schema = Any
"""A dict, or True (anything) or False (nothing)."""


def refused(what: str, fix: str) -> RequestError:
    """400 on response_format."""
    return RequestError(f"the JSON schema cannot be used: {what}", field="response_format", fix=fix)


def check_schema(schema: dict[str, Any]) -> None:
    """RequestError when the schema is outside the bounds or asks for what is not enforced."""
    if not isinstance(schema, dict):
        raise refused("it is not an object", "send a JSON schema")
    found = _Findings(schema)
    _walk(schema, found, 0)
    size = len(json.dumps(schema))
    _bound(size, MAX_BYTES, "bytes")
    _bound(found.properties, MAX_PROPERTIES, "properties in all")
    _bound(found.ranges, MAX_RANGES, "bounds of numbers in all")
    _bound(len(found.patterns), MAX_MERGED_PATTERNS if found.merges else MAX_PATTERNS, "patterns and formats in all")
    _bound(math.lcm(*found.multiples), MAX_MULTIPLE, "for the common multiple of all multipleOf")
    _bound(sum(len(schema.get(key, {})) for key in _DEFINITIONS), MAX_DEFINITIONS, "definitions")
    _branches(schema, found)
    if not _ends(schema, found):
        raise refused("every value that conforms is endless: a part requires itself", "make a recursive part optional")


@dataclass
class _Findings:
    root: Schema
    values: int = 0
    properties: int = 0
    ranges: int = 0
    merges: bool = False
    patterns: list[str] = field(default_factory=list)
    multiples: list[int] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=dict)
    """By $ref."""

    def target(self, reference: str) -> Schema:
        """What a $ref names."""
        named = _DEFINITION.fullmatch(reference)
        definitions = self.root.get(named[1], {}) if named else {}
        if reference == "#":
            return self.root
        if named is None or not isinstance(definitions, dict) or named[2] not in definitions:
            raise refused(f"$ref {reference[:80]!r} names nothing", "name '#' or '#/$defs/<one of the root's>'")
        return definitions[named[2]]


def _bound(value: int, limit: int, what: str) -> None:
    if value > limit:
        raise refused(f"{value} {what}; at most {limit} are allowed", f"stay within {limit}")


def _walk(schema: Schema, found: _Findings, depth: int) -> None:
    _count(found, depth)
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise refused(f"{str(schema)[:40]!r} stands where a schema belongs", "write an object, true or false")
    unknown = [key for key in schema if key not in _KNOWN]
    if unknown:
        raise refused(
            f"{str(unknown[0])[:40]!r} is not supported", f"leave it out; supported: {', '.join(sorted(_KNOWN))}"
        )
    _check_values(schema, found, depth)
    merging = len(_MERGING & schema.keys())
    found.merges |= "allOf" in schema or merging > 1 or (merging == 1 and _constrains(schema))
    for part in _parts(schema):
        _walk(part, found, depth + 1)


def _count(found: _Findings, depth: int) -> None:
    found.values += 1
    _bound(found.values, MAX_VALUES, "values (schemas and constants) in all")
    _bound(depth, MAX_DEPTH, "levels")


def _constrains(schema: dict[str, Any]) -> bool:
    return bool(schema.keys() - _MERGING - ANNOTATIONS - {*_DEFINITIONS})


def _parts(schema: dict[str, Any]) -> Iterator[Schema]:
    for key, value in schema.items():
        if key in _ONE and not (key == "items" and isinstance(value, list)):
            yield value
        elif key in _LISTS:
            if not isinstance(value, list) or not value:
                raise refused(f"{key} is no list of schemas", "write a list with at least one")
            yield from value
        elif key in _MAPS:
            if not isinstance(value, dict):
                raise refused(f"{key} is no object", "write an object of schemas")
            yield from value.values()
        elif key == "items":
            raise refused("a list in items is an older draft's", "write prefixItems")


def _check_values(schema: dict[str, Any], found: _Findings, depth: int) -> None:
    """Bounds on the keywords that hold no schemas."""
    for key in _LENGTHS & schema.keys():
        if not _is_whole(schema[key]):
            raise refused(f"{key} is no whole number from 0", "write one")
        _bound(schema[key], MAX_LENGTH, f"in {key}")
    for key in _RANGES & schema.keys():
        _check_number(key, schema[key])
        found.ranges += 1
    if schema.get("minProperties", 0) not in (0, 1):  # keys of additionalProperties may come twice
        raise refused("minProperties above 1 is not supported", "name the properties in required")
    if "multipleOf" in schema:
        found.multiples.append(_multiple(schema["multipleOf"]))
    if "pattern" in schema:
        found.patterns.append(_checked_pattern(schema["pattern"]))
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise refused(f"format {str(schema['format'])[:40]!r} is not supported", f"use one of {', '.join(FORMATS)}")
        found.patterns.append(schema["format"])
    if "$ref" in schema:
        if not isinstance(schema["$ref"], str):
            raise refused("$ref is no text", "name '#' or '#/$defs/<name>'")
        found.target(schema["$ref"])
    if isinstance(schema.get("properties"), dict):
        found.properties += len(schema["properties"])
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise refused("required is no list of names", "write a list of texts")
    found.properties += len(required)
    for key in (ANNOTATIONS | {"enum", "const"}) & schema.keys():
        _check_constant(schema[key], found, depth + 1)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise refused(f"{key} is no number from -{MAX_NUMBER} to {MAX_NUMBER}", "write one")


def _check_constant(value: Any, found: _Findings, depth: int) -> None:
    _count(found, depth)
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_constant(each, found, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number("a constant", value)


def _multiple(value: Any) -> int:
    _check_number("multipleOf", value)
    if value <= 0:
        raise refused("multipleOf is not above 0", "write a number above 0")
    exact = Fraction(str(value))
    decimals = 0
    while exact.denominator != 1 and decimals < 20:
        exact, decimals = exact * 10, decimals + 1
    return int(exact)


def _checked_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise refused("a pattern is no text", "write a regular expression")
    _bound(len(pattern), MAX_PATTERN_CHARS, "characters in a pattern")
    repeats = 1
    for low, high in _REPEATS.findall(pattern):
        _bound(len(low + high), 9, "digits in a repetition")
        repeats *= max(int(high or low), 1)
    _bound(repeats, MAX_REPEATS, "for the product of a pattern's counted repetitions")
    return pattern


def _branches(schema: Schema, found: _Findings) -> int:
    """Alternatives at this place once everything is merged; refuses what multiplies, here or below."""
    if not isinstance(schema, dict):
        return 1
    factors = [sum(_branches(part, found) for part in schema[key]) for key in ("anyOf", "oneOf") if key in schema]
    factors += [_branches(part, found) for part in schema.get("allOf", [])]
    if "$ref" in schema:
        factors.append(_branches_of_target(schema["$ref"], found))
    for part in _parts({key: value for key, value in schema.items() if key in _ONE | _MAPS or key == "prefixItems"}):
        _branches(part, found)
    branches = math.prod(factors)
    several = sum(factor > 1 for factor in factors) > 1
    _bound(branches, MAX_BRANCHES if several else MAX_ALTERNATIVES, "alternatives at one place")
    return branches


def _branches_of_target(reference: str, found: _Findings) -> int:
    if reference not in found.branches:
        found.branches[reference] = 1  # a definition that leads to itself adds no alternatives of its own
        found.branches[reference] = _branches(found.target(reference), found)
    return found.branches[reference]


def _ends(schema: Schema, found: _Findings) -> bool:
    """Whether some finite value conforms: definitions are taken as endless until one is found to end."""
    ending: set[int] = set()

    def ends(part: Schema) -> bool:
        if not isinstance(part, dict):
            return part is not False
        if "$ref" in part and id(found.target(part["$ref"])) not in ending:
            return False
        needed: list[Schema] = []
        if _only(part, "object"):
            needed = [part.get("properties", {}).get(name, True) for name in part.get("required", [])]
        if _only(part, "array"):
            first = part.get("prefixItems", [])
            needed = first[: part.get("minItems", 0)]
            needed += [part.get("items", True)] if part.get("minItems", 0) > len(first) else []
        choices = [part[key] for key in ("anyOf", "oneOf") if key in part]
        return all(map(ends, [*needed, *part.get("allOf", [])])) and all(any(map(ends, choice)) for choice in choices)

    roots = [schema, *(part for key in _DEFINITIONS for part in schema.get(key, {}).values())]
    while True:
        more = {id(part) for part in roots if id(part) not in ending and ends(part)}
        if not more:
            return id(schema) in ending
        ending |= more


def _only(schema: dict[str, Any], kind: str) -> bool:
    return schema.get("type") in (kind, [kind])
