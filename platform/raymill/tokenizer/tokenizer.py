"""Text to token ids and back, with one file, tokenizer.json, which transformers and the inference engines read too.

A tokenizer is trained here (training.py) or brought from elsewhere. Special ids are control: only code inserts them.
Text that spells `<|endoftext|>` is encoded letter by letter, whoever made the tokenizer.
Costs: `encode_flat` 50-100 MB/s per core where the kernel knows the tokenizer, which is so for all that are trained here,
else the library's 1-5 MB/s; `encode` is for a single short text; decoding needs no more than a table of bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import processors

from raymill.artifact import write_atomic
from raymill.errors import ArtifactError, UsageError
from raymill.tokenizer import training
from raymill.tokenizer.decoding import bytes_of_ids
from raymill.tokenizer.flat import arrow, bytes_and_offsets, encodable
from raymill.tokenizer.training import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS, Model

if TYPE_CHECKING:
    import pyarrow as pa

    from raymill.tokenizer.fast import FastEncoder

END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>", "[SEP]")
"""Names that the token after a document is known by, the likeliest first."""


class Tokenizer:
    """A vocabulary and how text is cut by it. Made by `load`, `bring` or `train`."""

    def __init__(self, inner: tokenizers.Tokenizer, end_token: str = END_OF_TEXT) -> None:
        self._inner = inner
        self._end_token = end_token
        # Not stored in tokenizer.json: without it, text that spells a special token would become one.
        self._inner.encode_special_tokens = True
        added = self._inner.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a tokenizer.json that `save` wrote. ArtifactError when it is missing, damaged or lacks control tokens."""
        fix = "name the tokenizer.json of a tokenize artifact, or bring this one with `bring`"
        inner = _read(path, fix)
        end_token = _marked_end(inner) or END_OF_TEXT
        missing = [name for name in (end_token, IM_START, IM_END) if inner.token_to_id(name) is None]
        if missing:
            why = f"it lacks {', '.join(missing)}"
            raise ArtifactError(f"{path} is not a tokenizer of raymill", why=why, fix=fix)
        return cls(inner, end_token)

    @classmethod
    def bring(cls, path: Path, end_token: str | None = None) -> Tokenizer:
        """Takes over any tokenizer.json the `tokenizers` library loads.

        end_token: the token after a document; None: the one `save` noted, or the first of END_TOKENS in the file. The control tokens of
        the chat template that it lacks are appended, so the vocabulary may grow by two. UsageError when there is no such
        end token, ArtifactError when the file is missing or damaged.
        """
        inner = _read(path, "name a tokenizer.json as the `tokenizers` library writes it")
        end_token = end_token or _marked_end(inner)
        known = [name for name in END_TOKENS if inner.token_to_id(name) is not None]
        if end_token is None and not known:
            what = f"{path} has no end-of-document token that is known here"
            raise UsageError(what, why=f"looked for {', '.join(END_TOKENS)}", fix="name its token: end_token: <name>")
        end_token = end_token or known[0]
        if inner.token_to_id(end_token) is None:
            raise UsageError(
                f"{path} has no token {end_token!r}",
                why=f"known end-of-document tokens in it: {', '.join(known) or 'none'}",
                fix="name one of its tokens as end_token",
            )
        inner.no_truncation()  # both are stored in the file, and both change what a text is encoded to
        inner.no_padding()
        inner.add_special_tokens([end_token, IM_START, IM_END])
        if end_token not in (END_OF_TEXT, _marked_end(inner)):
            _mark_end(inner, end_token)
        return cls(inner, end_token)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, model: Model = "bpe") -> Tokenizer:
        """Learns a vocabulary of at most `vocab_size`; fewer ids come out when the texts have too little to learn."""
        return cls(training.train(texts, vocab_size, model))

    def save(self, path: Path) -> None:
        write_atomic(path, self._inner.to_str(pretty=True))

    @cached_property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return 1 + max(self._inner.get_vocab().values())

    @property
    def end_id(self) -> int:
        """The id after every document."""
        return self.special_id(self._end_token)

    def special_id(self, name: str) -> int:
        """The id of a control token: one of SPECIAL_TOKENS, or the end token that was brought."""
        token = self._inner.token_to_id(name)
        assert name in (*SPECIAL_TOKENS, self._end_token) and token is not None, name
        return int(token)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Never a special id, whatever the text says."""
        ids = list(self._inner.encode(encodable(text), add_special_tokens=False).ids)
        if self._special.keys().isdisjoint(ids):
            return ids
        return [index for part in self._broken(text) for index in self.encode(part)]

    def encode_flat(self, texts: Sequence[str] | pa.Array, *, close: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ids of all texts, one after the other (uint32), and how many each text has (int64).

        texts: strings, or an Arrow array of strings without nulls, whose bytes are read where they lie. The ids are
        those of `encode`. With `close` every text ends with `end_id`, which is counted.
        """
        array = arrow(texts)
        if self._fast is None:
            return self._encode_by_library(array.to_pylist(), [self.end_id] if close else [])
        data, offsets = bytes_and_offsets(array)
        return self._fast.encode(data, offsets, self.end_id if close else None)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ids are skipped; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for; none for a special id or an id past the vocabulary."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    @cached_property
    def _bytes(self) -> list[bytes]:
        return bytes_of_ids(self._inner, self.vocab_size, self._special.keys())

    @cached_property
    def _fast(self) -> FastEncoder | None:
        # numba takes 0.2 s to import, which a server that encodes prompts need not pay.
        from raymill.tokenizer.fast import FastEncoder

        return FastEncoder.of(self._inner)

    def _encode_by_library(self, texts: list[str], closing: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        found = [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        special = self._special.keys()
        rows = [
            np.array((ids if special.isdisjoint(ids) else self.encode(text)) + closing, np.uint32)
            for text, ids in zip(texts, found, strict=True)
        ]
        return np.concatenate([np.empty(0, np.uint32), *rows]), np.array([len(row) for row in rows], np.int64)

    def _broken(self, text: str) -> Iterator[str]:
        """A text in parts none of which spells a special token: some models find them by themselves (Unigram does)."""
        start = 0
        while start < len(text):
            found = [at for name in self._special.values() if (at := text.find(name, start)) >= 0]
            stop = min(found) + 1 if found else len(text)
            yield text[start:stop]
            start = stop


class StreamDecoder:
    """Decodes one id at a time. A character whose bytes are spread over ids comes out whole, with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes; may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was cut, else nothing. The decoder can be used again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _read(path: Path, fix: str) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ArtifactError(f"there is no tokenizer at {path}", fix=fix)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing narrower
        raise ArtifactError(f"{path} is not a tokenizer", why=str(error)[:200], fix=fix) from None


def _mark_end(inner: tokenizers.Tokenizer, end_token: str) -> None:
    """Notes the end token in the file, which has no field for it: a last step that knows the token and adds nothing."""
    index = inner.token_to_id(end_token)
    mark = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[(end_token, index)])
    earlier = inner.post_processor
    inner.post_processor = mark if earlier is None else processors.Sequence([earlier, mark])


def _marked_end(inner: tokenizers.Tokenizer) -> str | None:
    """The end token that `_mark_end` noted."""
    step = training.spec(inner)["post_processor"]
    while step and step["type"] == "Sequence":
        step = step["processors"][-1]
    if not step or step["type"] != "TemplateProcessing" or len(step["single"]) > 1 or len(step["special_tokens"]) != 1:
        return None
    return str(*step["special_tokens"])
