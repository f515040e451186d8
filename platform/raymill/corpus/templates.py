"""Labelling: a prompt template turns the columns of a record into a task whose answer alone is learned.

In: a record's columns. Out: the parts of a document: what is given (not learned) and what is to be said (learned).
Placeholders are column names and nothing else: no attribute, index, conversion or format can be asked for, so a template
reads what stands in the record and never anything beside it. Costs about 2 us per record.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import Field, field_validator, model_validator

from raymill.config import Config
from raymill.corpus.document import Part
from raymill.corpus.limits import RecordError


class Template(Config):
    """How the columns of a record become a task; {column} stands for a value, {{ and }} for a bracket."""

    prompt: Annotated[str, Field(min_length=1)]
    """What the model is given, with {column} placeholders; it is not learned."""
    completion: Annotated[str, Field(min_length=1)]
    """What the model learns to say, with {column} placeholders."""
    system: str | None = None
    """What stands before the prompt, with {column} placeholders; it is not learned."""
    chat: bool = False
    """Make turns of a conversation (system, user, assistant) instead of plain text."""
    labels: dict[str, dict[str, str]] = {}
    """Words for the values of a column: {label: {0: negative, 1: positive}}."""

    @field_validator("prompt", "completion", "system")
    @classmethod
    def _check_placeholders(cls, text: str | None) -> str | None:
        if text is not None:
            _split(text)
        return text

    @field_validator("labels", mode="before")
    @classmethod
    def _keys_as_text(cls, labels: Any) -> Any:
        """YAML reads 0 and true as a number and a truth value; records may hold them as either."""
        if not isinstance(labels, dict):
            return labels
        return {
            str(column): {to_text(value): word for value, word in words.items()} if isinstance(words, dict) else words
            for column, words in labels.items()
        }

    @model_validator(mode="after")
    def _check_columns(self) -> Template:
        if not columns_of(self.completion):
            raise ValueError("the completion names no column; fix: write the answer's column in it, such as {answer}")
        unused = sorted(set(self.labels) - set(self.columns))
        if unused:
            raise ValueError(f"labels are given for {unused[0]}, which stands nowhere; fix: use {{{unused[0]}}}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column it asks for, sorted."""
        texts = (self.system or "", self.prompt, self.completion)
        return tuple(sorted({column for text in texts for column in columns_of(text)}))


def make_parts(template: Template, record: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of one task. Raises RecordError when the record lacks a column or its answer is empty."""
    values = {column: _word(template, record, column) for column in template.columns}
    completion = _fill(template.completion, values)
    if not completion.strip():
        raise RecordError("empty_completion", "there is nothing to learn in the answer")
    system, user, assistant = ("system", "user", "assistant") if template.chat else (None, None, None)
    parts = [Part(_fill(template.prompt, values), user, False), Part(completion, assistant, True)]
    if template.system is not None:
        parts.insert(0, Part(_fill(template.system, values), system, False))
    return tuple(parts)


def to_text(value: Any) -> str:
    """A column's value as text: strings as they are, everything else as JSON writes it."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value, default=str).decode()
    except (orjson.JSONEncodeError, RecursionError):
        return str(value)


def columns_of(text: str) -> set[str]:
    """The column names in a text with placeholders."""
    return {column for _, column in _split(text) if column is not None}


def _word(template: Template, record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        raise RecordError("missing_column", f"no {column!r}; columns: {', '.join(map(str, record))[:200]}")
    text = to_text(value)
    words = template.labels.get(column)
    if words is None:
        return text
    if text not in words:
        raise RecordError("unknown_label", f"{column!r} is {text[:60]!r}; labels: {', '.join(words)[:200]}")
    return words[text]


def _split(text: str) -> list[tuple[str, str | None]]:
    """(literal text, column after it or None). Raises ValueError for a placeholder that is no plain column name."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"{str(error).lower()}; fix: write {{{{ and }}}} for brackets that are no placeholder"
        ) from None
    for _, column, form, conversion in pieces:
        if column is not None and (not column.strip() or form or conversion or set(column) & set(".[]")):
            raise ValueError(f"{{{column}}} is no column name; fix: a placeholder holds the name of a column only")
    return [(literal, column) for literal, column, _, _ in pieces]


def _fill(text: str, values: Mapping[str, str]) -> str:
    return "".join(literal + (values[column] if column is not None else "") for literal, column in _split(text))
