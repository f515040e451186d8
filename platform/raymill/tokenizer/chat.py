"""A conversation to token ids, in the ChatML form. Only this file inserts the control ids between turns.

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n

What a user types is encoded as plain text, so a message that spells `<|im_end|>` cannot end its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raymill.tokenizer.bpe import IM_END, IM_START, Tokenizer

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, open_answer: bool = True) -> list[int]:
    """The ids of a conversation; with `open_answer` they end where the assistant begins to speak."""
    start, end = tokenizer.special_id(IM_START), tokenizer.special_id(IM_END)
    line_break = tokenizer.encode("\n")
    ids: list[int] = []
    for message in messages:
        # Each part is encoded on its own, so that no token straddles the border of a role or a turn.
        ids += [start, *tokenizer.encode(message.role), *line_break, *tokenizer.encode(message.content)]
        ids += [end, *line_break]
    if open_answer:
        ids += [start, *tokenizer.encode("assistant"), *line_break]
    return ids
