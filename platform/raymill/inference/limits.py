"""What a request may ask of a model, whichever engine runs it: RequestError names the field and the limit."""

from __future__ import annotations

from collections.abc import Collection

from raymill.errors import RequestError
from raymill.inference.requests import MAX_LOGPROBS, Request


def check_request(request: Request, max_seq_len: int, vocab_size: int) -> None:
    """Raises where the request is outside the model's limits."""
    least = 1 if request.prompt_logprobs is None else 0
    if request.max_tokens < least:
        raise RequestError(
            f"max_tokens is {request.max_tokens}", field="max_tokens", fix=f"set max_tokens to at least {least}"
        )
    most = min(MAX_LOGPROBS, vocab_size)
    for field, top in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if top is not None and not 0 <= top <= most:
            raise RequestError(f"{field} is {top}", field=field, fix=f"set it from 0 to {most}")
    check_ids(request.prompt_ids, request.max_tokens, max_seq_len, vocab_size)


def check_ids(ids: tuple[int, ...], max_tokens: int, max_seq_len: int, vocab_size: int) -> None:
    """Raises where these ids, and a completion of max_tokens, are more than the model takes."""
    if not ids:
        raise RequestError("the prompt is empty", field="prompt", fix="send at least one token")
    if len(ids) + max_tokens > max_seq_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}; together they may be {max_seq_len}",
            field="max_tokens" if max_tokens else "prompt",
            fix=f"shorten the prompt, or set max_tokens to at most {max(0, max_seq_len - len(ids))}",
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RequestError(f"a prompt id is outside 0..{vocab_size - 1}", field="prompt")


def check_adapter(name: str | None, known: Collection[str]) -> None:
    """Raises where no adapter is called so."""
    if name is not None and name not in known:
        names = ", ".join(known) or "none"
        raise RequestError(f"there is no adapter {name!r}", field="model", status=404, fix=f"name one of: {names}")
