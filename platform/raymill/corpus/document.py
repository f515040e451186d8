"""What travels through the corpus room: a document on its way in, or a record that holds no text we can read.

A document is one text. Where only some of it is to be learned (a conversation, a task made from columns), `parts` say
which piece is whose; a document of one plain text has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prose", "code", "chat", "task"]
"""What rules a document is judged by: chat (turns) and task (from a template) are only asked not to be empty."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a document's text, encoded on its own."""

    text: str
    role: str | None
    """Who speaks; the turn is put between the chat template's control tokens. None: plain text."""
    learn: bool
    """Whether its tokens count in the loss."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its name and what is known of it."""

    id: str
    """File name in the corpus, then # and the byte offset or row of the record where the file holds several."""
    text: str
    """All of it; with parts, their texts one after the other."""
    kind: Kind
    source: str
    """Name of the source it came from."""
    parts: tuple[Part, ...] = ()
    """Empty for plain text, all of which is learned."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further fields of the record that the job asked to keep."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that holds no text we can read."""

    file: str
    """The file's name in the corpus."""
    row: int | None
    """Record of the file, counted from 0; None: the file as a whole, or unknown because the file was cut into ranges."""
    offset: int
    """Byte of the (unpacked) file where the record, or the fault in it, begins."""
    reason: str
    """One of a few words, for counting."""
    detail: str
    """What exactly was found."""


Record = Document | Unreadable
