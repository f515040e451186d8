"""A record with columns to a document: its text, its conversation, or the task a template makes of it.

    template given                              kind task: what is given, and what is to be said
    `messages` [{role, content}] or
    `conversations` [{from, value}]             kind chat: one part per turn, the assistant's are learned
    otherwise, or where these are null          the text in the column `text_field`

Every reader whose records have columns ends here, so jsonl, json, csv and parquet agree on what is a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymill.corpus.document import Document, Part, Record, Unreadable
from raymill.corpus.limits import ReadLimits, RecordError
from raymill.corpus.sources import SourceFile
from raymill.corpus.templates import make_parts, to_text

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""The roles of `messages`, and what `conversations` and older records call them."""
_TURN_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
TURNS = tuple(_TURN_FIELDS)


def to_document(
    record: Mapping[str, Any], file: SourceFile, limits: ReadLimits, document_id: str, row: int | None, offset: int
) -> Record:
    """The document of one record, or why it is none."""
    settings = file.settings
    parts: tuple[Part, ...] = ()
    kind = file.kind
    try:
        if settings.template is not None:
            parts, kind = make_parts(settings.template, record), "task"
        elif (column := _choose_turns(record, settings.text_field)) is not None:
            parts, kind = _read_turns(record[column], *_TURN_FIELDS[column]), "chat"
        text = "".join(part.text for part in parts) if parts else _read_text(record, settings.text_field)
        if "\0" in text:
            raise RecordError("nul", f"a NUL character at {text.index(chr(0))}")
        if len(text) > limits.max_document_bytes:
            raise RecordError("too_long", f"over {limits.max_document_bytes:,} bytes")
    except RecordError as error:
        return Unreadable(file.name, row, offset, error.reason, error.detail)
    if not settings.keep:
        return Document(document_id, text, kind, file.source, parts)
    columns = {name: to_text(record[name]) for name in settings.keep if record.get(name) is not None}
    return Document(document_id, text, kind, file.source, parts, columns)


def _choose_turns(record: Mapping[str, Any], text_field: str) -> str | None:
    """The column of the conversation; None where the text is to be read: there is no conversation, or a null beside a text."""
    there = [column for column in TURNS if column in record]
    given = next((column for column in there if record[column] is not None), None)
    return given or (there[0] if there and record.get(text_field) is None else None)


def _read_text(record: Mapping[str, Any], text_field: str) -> str:
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if text_field not in record:
        names = ", ".join(sorted(map(str, record)))[:200]
        raise RecordError("no_text_field", f"no {text_field!r}; fields: {names}")
    raise RecordError("text_not_a_string", f"{text_field!r} holds a {type(text).__name__}")


def _read_turns(turns: Any, role_field: str, text_field: str) -> tuple[Part, ...]:
    if not isinstance(turns, list) or not turns:
        raise RecordError("no_turns", f"a {type(turns).__name__}, not a list of turns" if turns else "no turn in it")
    parts = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RecordError("bad_turn", f"turn {number} is a {type(turn).__name__}")
        role, text = turn.get(role_field), turn.get(text_field)
        if not isinstance(role, str) or role not in _ROLES:
            raise RecordError("unknown_role", f"turn {number} is by {str(role)[:60]!r}; known: {', '.join(_ROLES)}")
        if isinstance(text, list):
            text = _join_pieces(text, number)
        if not isinstance(text, str):
            raise RecordError("bad_turn", f"turn {number} has {text_field!r} {type(text).__name__}, not text")
        parts.append(Part(text, _ROLES[role], _ROLES[role] == "assistant"))
    if not any(part.learn for part in parts):
        raise RecordError("no_answer", "no turn is the assistant's, so there is nothing to learn")
    return tuple(parts)


def _join_pieces(pieces: list[Any], number: int) -> str:
    """The text of a turn given as [{type: text, text: ...}]."""
    for piece in pieces:
        kind = piece.get("type") if isinstance(piece, dict) else type(piece).__name__
        if not isinstance(piece, dict) or kind != "text" or not isinstance(piece.get("text"), str):
            raise RecordError("bad_turn", f"turn {number} holds a piece that is no text: {str(kind)[:60]!r}")
    return "".join(piece["text"] for piece in pieces)
