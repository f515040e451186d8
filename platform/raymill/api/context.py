"""Whether a prompt and what is to follow it fit the model's context.

No JSON schema can count tokens, so what the OpenAPI document takes may be refused here. Such a refusal has OpenAI's own code
for it and the words "maximum context length", by which clients tell it from other mistakes: a caller may then shorten the
prompt or choose another model.
"""

from __future__ import annotations

from raymill.errors import RequestError


class ContextError(RequestError):
    """More tokens than the model's context holds."""

    def __init__(self, what: str, max_seq_len: int, *, field: str, fix: str = "shorten it") -> None:
        limit = f"this model's maximum context length is {max_seq_len} tokens"
        super().__init__(f"{limit}; {what}", field=field, fix=fix)


def check_fits(tokens: int, max_seq_len: int, field: str) -> None:
    """ContextError where a text alone is too long."""
    if tokens > max_seq_len:
        raise ContextError(f"{field} has {tokens} tokens", max_seq_len, field=field)


def completion_length(
    tokens: int, asked: int | None, default: int, max_seq_len: int, *, field: str, length_field: str
) -> int:
    """Most tokens of the completion of a prompt: what is asked for, which must fit behind it, or what fits of the default.

    field, length_field: what the client calls the prompt and the length.
    """
    room = max_seq_len - tokens
    if room < (1 if asked is None else min(asked, 1)):
        raise ContextError(f"{field} has {tokens} tokens, and a completion at least one", max_seq_len, field=field)
    if asked is None:
        return min(default, room)
    if asked > room:
        fix = f"shorten {field}, or set {length_field} to at most {room}"
        what = f"{field} has {tokens} tokens and {length_field} is {asked}"
        raise ContextError(what, max_seq_len, field=length_field, fix=fix)
    return asked
