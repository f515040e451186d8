"""Log probabilities as OpenAI's two APIs write them, one entry for each token that was made, the end token too.

A token is its text; where its bytes are no whole character, `bytes:\\xe2\\x82`; a control token is its name. Cost: 2 us a
token and 1 us for each of the likeliest beside it; the text of an id is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from raymill.inference.sampling import TokenLogprob
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from raymill.tokenizer.training import END_OF_TEXT, IM_END, IM_START

_KEPT_NAMES = 65_536


class TokenNames:
    """How ids are shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Whatever the end of a document is called in a tokenizer from elsewhere, here it has one name.
        self._control = {tokenizer.end_id: END_OF_TEXT}
        self._control |= {tokenizer.special_id(name): name for name in (IM_START, IM_END)}
        self.name = lru_cache(_KEPT_NAMES)(self._name)
        """The text of an id; no two ids of a vocabulary share one."""

    def _name(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token)
        if not data:
            return self._control.get(token, f"token_id:{token}")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token: int) -> list[int] | None:
        """None for a control token."""
        return list(self.tokenizer.token_bytes(token)) or None


class CompletionLogprobs:
    """Those of one completion as /v1/completions writes them; text_offset goes on from part to part."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = StreamDecoder(names.tokenizer)
        self._offset = 0

    def body(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens' part."""
        name = self._names.name
        offsets = []
        for each in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(each.token))
        return {
            "tokens": [name(each.token) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens],
            "text_offset": offsets,
        }

    def _top(self, each: TokenLogprob) -> dict[str, float] | None:
        """The likeliest and the token itself, which may make one more."""
        if each.logprob is None:
            return None
        top = {self._names.name(token): logprob for token, logprob in each.top}
        top.setdefault(self._names.name(each.token), each.logprob)
        return top


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Those of some tokens as /v1/chat/completions writes them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": logprob, "bytes": names.bytes(token)}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]} for each in tokens
    ]
    return {"content": content, "refusal": None}
