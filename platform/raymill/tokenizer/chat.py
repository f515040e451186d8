"""A conversation to token ids, in the ChatML form. Only this file inserts the control ids between turns.

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n

What a user types is encoded as plain text, so a message that spells `<|im_end|>` cannot end its turn. Where a model
learns from a turn, it learns what it must say itself: the content and `<|im_end|>`; never the header, nor the line break
behind the turn, which the server inserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raymill.tokenizer.tokenizer import Tokenizer
from raymill.tokenizer.training import IM_END, IM_START

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class ChatTemplate:
    """What stands around the content of a turn. Keeps the ids of the headers met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special_id(IM_START)
        self._line_break = tokenizer.encode("\n")
        self._headers: dict[str, list[int]] = {}
        self.end_id = tokenizer.special_id(IM_END)
        """The id that ends a turn, which the one who speaks must say."""

    def header(self, role: str) -> list[int]:
        """The ids before the content."""
        if role not in self._headers:
            self._headers[role] = [self._start, *self._tokenizer.encode(role), *self._line_break]
        return self._headers[role]

    @property
    def tail(self) -> list[int]:
        """The ids behind the content: the end of the turn and a line break."""
        return [self.end_id, *self._line_break]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, open_answer: bool = True) -> list[int]:
    """The ids of a conversation; with `open_answer` they end where the assistant begins to speak."""
    template = ChatTemplate(tokenizer)
    ids: list[int] = []
    for message in messages:
        # Each part is encoded on its own, so that no token straddles the border of a role or a turn.
        ids += [*template.header(message.role), *tokenizer.encode(message.content), *template.tail]
    if open_answer:
        ids += template.header("assistant")
    return ids
