"""Output that conforms to a JSON schema: which ids may come next, decided by llguidance.

`Grammars` is made once per tokenizer; a `Grammar` is one compiled schema, shared by requests; a `Match` follows one
completion. A mask costs about 50 us a token, a schema up to some 50 ms, once: the last ones stay compiled.

llguidance sees the bytes that our ids stand for, not a tokenizer file, so any tokenizer works, and a character may be
spread over ids. Its output is stricter than JSON where that makes completions end and parse everywhere: no \\u escapes
(half a surrogate pair is no character), at most 64 blanks in a row, properties in the schema's order.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raymill.inference.json_schema import check_schema, refused

if TYPE_CHECKING:
    import llguidance

    from raymill.tokenizer.tokenizer import Tokenizer

Mask = NDArray[np.uint32]
"""(ceil(V / 32),): bit i % 32 of word i // 32 says whether id i may come next."""

_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \n\t]{1,64}", "json_allowed_escapes": 'nrbtf\\"'}
_LIMITS = {
    "initial_lexer_fuel": 500_000,  # 10 ms
    "step_lexer_fuel": 200_000,  # 14 ms
    "step_max_items": 50_000,
    "max_lexer_states": 5_000,  # 10 MB
    "max_grammar_size": 50_000,
}


class Match(Protocol):
    """A grammar on the way through one completion."""

    def mask(self) -> Mask:
        """The ids that may come next; the end tokens only where the text may end. None at all where the grammar became
        too complex to follow."""
        ...

    def advance(self, token: int) -> None:
        """Takes the token that came. ValueError when it may not come."""
        ...


class Grammar(Protocol):
    """A compiled constraint."""

    def start(self) -> Match:
        """A completion's beginning."""
        ...


class Grammars:
    """The constraints that requests name, for one tokenizer. May be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int] | None = None, max_compiled: int = 16) -> None:
        """end_ids: may come where the text may end, and nowhere else; by default the end of a document."""
        import llguidance  # 10 ms, and only some replicas need it

        self._library = llguidance
        self._ids = llguidance.LLTokenizer(
            _Vocabulary(tokenizer, list(end_ids or [tokenizer.end_id])),  # type: ignore[arg-type]
            n_vocab=tokenizer.vocab_size,
            eos_token=list(end_ids or [tokenizer.end_id]),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._max_compiled = max_compiled
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """A JSON value that the schema allows. RequestError for a schema that is wrong, too large, or asks for what cannot
        be enforced."""
        check_schema(schema)
        text = json.dumps(schema, separators=(",", ":"))
        with self._lock:
            compiled = self._compiled.get(text)
            if compiled is None:
                compiled = self._compiled[text] = self._compile(text)
            self._compiled.move_to_end(text)
            if len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        return compiled

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def _compile(self, text: str) -> _Compiled:
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)  # type: ignore[arg-type]
        except ValueError as error:
            raise refused(str(error)[:300], "send a JSON schema") from None
        limits = self._library.LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = self._library.LLMatcher(self._ids, grammar, log_level=0, limits=limits)
        warnings = matcher.get_grammar_warnings()
        if matcher.is_error() or warnings:
            why = matcher.get_error() or warnings[0]
            raise refused(
                " ".join(why.split())[:300], "change the schema; see the supported keywords in the API's guide"
            )
        compiled = _Compiled(matcher)
        if not compiled.start().mask().any():
            raise refused("no text conforms to the schema", "loosen it")
        return compiled


class _Compiled:
    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> Match:
        return _Match(self._matcher.deep_copy())


class _Match:
    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> Mask:
        found: Mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return np.zeros_like(found) if self._matcher.is_error() else found

    def advance(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"id {token} may not come here")


class _Vocabulary:
    """The tokenizer as llguidance asks for it; it marks its kind by an attribute."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token, found in enumerate(self.tokens) if not found]
        self.eos_token_id = end_ids[0]
        self._by_bytes = {found: token for token, found in enumerate(self.tokens) if found}
        self._longest = max(map(len, self._by_bytes))
        # llguidance wants a text for special ids too, to tell them apart; none of them can be spelled.
        for token in self.special_token_ids:
            self.tokens[token] = b"<|%d|>" % token

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that must come, as the model has learned them; they must stand for exactly its bytes."""
        wanted = text.encode()
        ids = self._tokenizer.encode(text)
        if b"".join(map(self._tokenizer.token_bytes, ids)) == wanted:
            return ids
        ids, start = [], 0
        while start < len(wanted):  # a tokenizer that puts a blank before each text, for one
            lengths = range(min(self._longest, len(wanted) - start), 0, -1)
            length = next((n for n in lengths if wanted[start : start + n] in self._by_bytes), None)
            if length is None:
                return ids
            ids.append(self._by_bytes[wanted[start : start + length]])
            start += length
        return ids
