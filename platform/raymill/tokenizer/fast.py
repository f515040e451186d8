"""Which tokenizer.json the compiled kernel can encode for, and the tables it encodes with.

The kernel serves bytes written as letters, cut into words as Llama 3 or GPT-2 cuts them or into characters, under a BPE,
WordPiece or Unigram model. A BPE is encoded wholly by the kernel; for the others the library is asked once for each
piece that was not met lately. Everything else is the library's work.
Costs: tables of 10 MB and 0.2 s to make them; see kernel.py for the speed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from raymill.tokenizer import kernel
from raymill.tokenizer.kernel import Bytes, Ids, Numbers, Pieces, Tables, Words
from raymill.tokenizer.training import CHARACTERS, CHOP_CHARS, CHOPS, WORDS, byte_letters, spec

_BPE_PIECES = 1 << 17
"""Pieces remembered, 4 MB of them and a quarter as many long ones: more would not fit the processor's cache."""
_OTHER_PIECES = 1 << 19
"""The same where a miss costs 10 us instead of 0.5, 16 MB."""
_LAST_CLASSED = 0x40000
"""No letter, number or white space has a code point from here on; a test looks at all of them."""


CUTS = {WORDS: kernel.CUT_WORDS, CHARACTERS: kernel.CUT_CHARACTERS}
"""The regular expressions that the kernel knows."""


class FastEncoder:
    """Encodes many texts at once. Not for two threads at a time."""

    def __init__(self, inner: tokenizers.Tokenizer, tables: Tables, special: frozenset[int]) -> None:
        self._model = inner.model
        self._tables = tables
        self._special = special
        self._letters = {byte: letter for letter, byte in byte_letters().items()}

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> FastEncoder | None:
        """None: this tokenizer is not one the kernel knows."""
        content = spec(inner)
        known_cut = _cut(content["pre_tokenizer"])
        model, added = content["model"], content["added_tokens"]
        if known_cut is None or content["normalizer"] or not all(token["special"] for token in added):
            return None
        special = frozenset(token["id"] for token in added)
        if model["type"] not in ("BPE", "WordPiece", "Unigram") or model.get("dropout"):
            return None
        vocabulary = _vocabulary(model)
        if not byte_letters().keys() <= vocabulary.keys() or len({*vocabulary.values()}) < len(vocabulary):
            return None
        merges = np.empty((0, 3), np.uint64)
        if model["type"] == "BPE":
            if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
                return None
            rows = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in model["merges"]]
            merges = np.array(rows, np.uint64).reshape(-1, 3)
            if special.intersection(merges[:, 2].tolist()):
                return None
        whole = _whole(vocabulary, special) if model.get("ignore_merges") else []
        return cls(inner, _tables(known_cut, merges, whole, vocabulary, model["type"] == "BPE"), special)

    def encode(self, data: Bytes, offsets: Numbers, close_id: int | None) -> tuple[Ids, Numbers]:
        """The ids of the texts data[offsets[i]:offsets[i + 1]], each closed by `close_id`, and how many each has."""
        documents = len(offsets) - 1
        ids = np.empty(int(offsets[-1] - offsets[0]) + documents + 4, np.uint32)
        lengths, state = np.zeros(documents, np.int64), np.zeros(6, np.int64)
        close = -1 if close_id is None else close_id
        while not kernel.encode_documents(data, offsets, close, self._tables, state, ids, lengths):
            start, stop = state[kernel.MISS_START], state[kernel.MISS_STOP]
            found = self._model_ids("".join(map(self._letters.__getitem__, data[start:stop].tolist())))
            out = state[kernel.OUT]
            ids[out : out + len(found)] = found
            kernel.remember(self._tables, data, start, stop - start, ids, out, len(found))
            state[kernel.OUT] += len(found)
        return ids[: state[kernel.OUT]], lengths

    def _model_ids(self, letters: str) -> list[int]:
        """The model's ids of one piece; a piece that spells a special token is encoded in two parts."""
        found = [token.id for token in self._model.tokenize(letters)]
        if self._special.isdisjoint(found) or len(letters) == 1:
            return found
        return self._model_ids(letters[:1]) + self._model_ids(letters[1:])


@lru_cache(maxsize=1)
def classes() -> Bytes:
    """The class of every code point, asked of the engine that runs the regular expressions, so that both agree."""
    text = "".join(chr(point) for point in range(_LAST_CLASSED) if not 0xD800 <= point < 0xE000)
    # Runs of one class first, in one go over all characters; then only the first character of each is asked about.
    runs = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[\r\n]|\s"), "isolated").pre_tokenize_str(text)
    found = np.zeros(0x110000, np.uint8)
    for pattern, kind in ((r"\p{L}", 1), (r"\p{N}", 2), (r"\s", 3), (r"[\r\n]", 4)):
        chosen = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        firsts = {piece for piece, _ in chosen.pre_tokenize_str("".join(run[0] for run, _ in runs))}
        for run, _ in runs:
            if run[0] in firsts:
                start = ord(run[0])
                found[start : ord(run[-1]) + 1] = kind
    return found


def _cut(content: dict[str, Any] | None) -> tuple[int, int] | None:
    """How the pre-tokenizer cuts (see kernel.py) and after how many characters it cuts a piece again."""
    if content is None:
        return None
    if content["type"] == "ByteLevel":
        return None if content["add_prefix_space"] or not content["use_regex"] else (kernel.CUT_GPT2, 0)
    *splits, last = content["pretokenizers"] if content["type"] == "Sequence" else [content]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"]:
        return None
    patterns = []
    for split in splits:
        if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
            return None
        patterns.append(split["pattern"].get("Regex"))
    chop_chars = CHOP_CHARS if patterns[1:] == [CHOPS] else 0
    if not patterns or patterns[0] not in CUTS or (patterns[1:] and not chop_chars):
        return None
    return CUTS[patterns[0]], chop_chars


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary


def _whole(vocabulary: dict[str, int], special: frozenset[int]) -> list[tuple[bytes, int]]:
    letters = byte_letters()
    return [
        (bytes(letters[letter] for letter in token), index)
        for token, index in vocabulary.items()
        if index not in special and all(letter in letters for letter in token)
    ]


def _tables(
    cut: tuple[int, int],
    merges: NDArray[np.uint64],
    whole: list[tuple[bytes, int]],
    vocabulary: dict[str, int],
    bpe: bool,
) -> Tables:
    pairs = np.full(2 * _power(2 * len(merges) + 1), 2**64 - 1, np.uint64)
    kernel.put_pairs(pairs, merges.ravel())
    starts = np.cumsum([0, *(len(text) for text, _ in whole)])
    fixed = empty_pieces(len(whole) + 1, int(starts[-1]), len(whole))
    text = np.frombuffer(b"".join(text for text, _ in whole), np.uint8)
    kernel.put_all(fixed, text, starts, np.array([index for _, index in whole], np.uint32))
    letters = sorted(byte_letters().items(), key=lambda item: item[1])
    remembered = _BPE_PIECES if bpe else _OTHER_PIECES
    return Tables(
        classes=classes(),
        lead=_lead(cut[0]),
        short=_short(4 * remembered),
        long=empty_pieces(remembered // 4, 8 * remembered, 4 * remembered),
        whole=fixed,
        pairs=pairs,
        byte_ids=np.array([vocabulary[letter] for letter, _ in letters], np.uint32),
        cut=cut[0],
        chop_chars=cut[1],
        merges=bpe,
    )


def _lead(cut: int) -> Bytes:
    kinds = classes()[:256].copy()
    lead = np.zeros(256, np.uint8)
    if cut == kernel.CUT_CHARACTERS:
        return lead
    lead[:128][kinds[:128] == kernel.LETTER] = 1
    if cut == kernel.CUT_WORDS:
        lead[:128][(kinds[:128] == kernel.OTHER) | (kinds[:128] == kernel.SPACE)] = 2
        lead[ord("'")] = 0
    else:
        lead[ord(" ")] = 2
    return lead


def _short(words: int) -> Words:
    """Zeros that begin where a cache line begins."""
    memory = np.zeros(words + 8, np.uint64)
    skip = -(memory.ctypes.data // 8) % 8
    return memory[skip : skip + words]


def empty_pieces(entries: int, text_bytes: int, ids: int) -> Pieces:
    """A table with room for so much."""
    slots = _power(2 * entries)
    return Pieces(
        slots=np.zeros(slots, np.int64),
        entries=np.zeros(4 * entries, np.int64),
        text=np.zeros(max(1, text_bytes), np.uint8),
        ids=np.zeros(max(1, ids), np.uint32),
        used=np.zeros(3, np.int64),
    )


def _power(least: int) -> int:
    return 1 << (least - 1).bit_length()
