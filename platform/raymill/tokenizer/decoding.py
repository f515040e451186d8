"""The bytes each id stands for, whatever letters the tokenizer.json writes them with.

byte-level     letters for bytes, as GPT-2 writes them (all that is trained here): exact
sentencepiece  U+2581 for a space, <0x0A> for a byte (Llama 2, Gemma, T5): exact but for a space that the tokenizer puts
               before a text, which stays in the decoded text
others         what the library decodes behind another token: right for BERT's ##, and text may differ in its spaces
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import tokenizers

from raymill.tokenizer.training import byte_letters, spec

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


class _Latin1(dict[int, int]):
    """Letters to the bytes they stand for, as `str.translate` asks; any other letter to one that Latin-1 has not."""

    def __missing__(self, letter: int) -> int:
        return 0xFFFF


def bytes_of_ids(inner: tokenizers.Tokenizer, vocab_size: int, special: Container[int]) -> list[bytes]:
    """By id; special ids and ids that no token has stand for nothing."""
    kinds, mark = _decoder(inner)
    as_latin_1 = _Latin1({ord(letter): byte for letter, byte in byte_letters().items()})
    anchor = next((token for token in range(vocab_size) if token not in special and inner.id_to_token(token)), 0)
    found = []
    for index in range(vocab_size):
        token = inner.id_to_token(index)
        if token is None or index in special:
            found.append(b"")
        elif "ByteLevel" in kinds:
            token = token.removeprefix(mark)
            try:
                found.append(token.translate(as_latin_1).encode("latin-1"))
            except UnicodeEncodeError:  # not spelled in the letters of bytes
                found.append(token.encode())
        elif kinds & {"Metaspace", "ByteFallback"}:
            byte = _BYTE.fullmatch(token)
            found.append(bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode())
        else:
            found.append(inner.decode([anchor, index])[len(inner.decode([anchor])) :].encode())
    return found


def _decoder(inner: tokenizers.Tokenizer) -> tuple[set[str], str]:
    """The kinds of decoders in the file, and the mark of a piece inside a word that WordPiece strips; may be empty."""
    content = spec(inner)
    decoder: dict[str, Any] = content["decoder"] or {"type": "none"}
    steps = decoder.get("decoders", [decoder])
    return {step["type"] for step in steps}, content["model"].get("continuing_subword_prefix") or ""
