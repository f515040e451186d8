"""Splits UTF-8 text into words, punctuation marks being words of their own, for rules that count and compare them.

The words are those of spaCy's blank English tokenizer, which the field's filters use. `corpus.chunks` knows how a chunk
between white space is cut; here are the two shortcuts that make it fast. A compiled loop cuts the plain chunks itself
(letters or digits, then at most one mark), and remembers how every other chunk was cut the first time it was seen.
Nothing of a word is kept but its hash, its length and a few flags. Costs 110 MB/s per core, 17 us for each
chunk that is seen for the first time and is not plain, and 13 MB of memory per thread.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.chunks import code_points, cut_chunk, exceptions
from raymill.corpus.measures import FNV_PRIME, FNV_START, Bytes, Hashes, mix, space_width

Facts = NDArray[np.int64]
"""Per word: its length in characters << CHARS_SHIFT | number of the stop word << STOP_SHIFT | flags."""
VISIBLE = 1
"""Some character is no punctuation."""
LETTER = 2
"""Some character is a letter."""
ENDS_SENTENCE = 4
"""It is one of the marks that end a sentence."""
PUNCTUATION = 8
"""All characters are punctuation by Unicode."""
AFTER_SPACES = 16
"""More than a single blank stands before it."""
STARTS_LINE = 32
STOP_SHIFT = 8
CHARS_SHIFT = 16
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

SENTENCE_ENDS = frozenset(
    code_points(
        "21 2E 3F 589 61F 6D4 700-702 7F9 964-965 104A-104B 1362 1367-1368 166E 1735-1736 1803 1809 1944-1945 1AA8-1AAB "
        "1B5A-1B5B 1B5E-1B5F 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E 2E3C 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 "
        "A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 11047-11048 "
        "110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 "
        "115C9-115D7 11641-11642 1173C-1173E 11A42-11A43 11A9B-11A9C 11C41-11C42 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
        "1BC9F 1DA88"
    )
)
"""Marks that end a sentence in some script."""
TERMINAL_MARKS = SENTENCE_ENDS | frozenset(
    code_points(
        "61D-61E 837 839 83D-83E 17D4-17D6 17D9-17DA 1B7D-1B7E 2E53-2E54 10F55-10F59 10F86-10F89 11944 11946 11EF7-11EF8 "
        "11F43-11F44 16E98"
    )
)
"""Marks that may end a line of prose."""
_INVISIBLE = TERMINAL_MARKS | frozenset(
    code_points(
        "0-8 B-1F 21-2F 3A-40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001-3002 3008-300D "
        "3010-3011 FF01 FF05 FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF5E"
    )
)
"""What the field's filters call punctuation, control characters with it."""

_OTHER, _LOWER, _UPPER, _DIGIT, _MARK, _DOT, _SPACE, _WIDE = range(8)
_SLOTS = 1 << 18
_LEARNED_WORDS = 1 << 19


class _Memory(NamedTuple):
    """How chunks are cut: an open hash table from a chunk's hash to a stretch of two arrays of words."""

    keys: Hashes
    stretches: NDArray[np.int64]
    """First word << 32 | number of words."""
    hashes: Hashes
    facts: Facts
    used: NDArray[np.int64]
    """Chunks and words in use."""


def _new_memory(slots: int, words: int) -> _Memory:
    return _Memory(
        np.zeros(slots, np.uint64),
        np.zeros(slots, np.int64),
        np.empty(words, np.uint64),
        np.empty(words, np.int64),
        np.zeros(2, np.int64),
    )


class WordSplitter:
    """Splits texts of one thread; what it remembers makes it faster and changes no result."""

    def __init__(self) -> None:
        self._fixed = _new_memory(1 << 12, 1 << 13)
        self._learned = _new_memory(_SLOTS, _LEARNED_WORDS)
        self._hashes, self._facts = np.empty(1 << 14, np.uint64), np.empty(1 << 14, np.int64)
        for text, words in {word: (word,) for word in STOP_WORDS}.items() | exceptions().items():
            if not any(map(str.isspace, text)):
                _learn(self._fixed, text, words)

    def split(self, text: Bytes) -> tuple[Hashes, Facts]:
        """Hash and facts of every word; views that the next call overwrites."""
        if len(self._hashes) <= len(text):
            size = 2 * len(text)
            self._hashes, self._facts = np.empty(size, np.uint64), np.empty(size, np.int64)
        at, words, end = 0, 0, 0
        while True:
            at, words, end = _split(text, at, words, self._hashes, self._facts, self._fixed, self._learned)
            if end < 0:
                return self._hashes[:words], self._facts[:words]
            self._meet(bytes(text[at:end]).decode().strip())

    def _meet(self, chunk: str) -> None:
        """Remembers a chunk that is seen for the first time; forgets all others when there is no room."""
        words = cut_chunk(chunk)
        chunks, held = self._learned.used.tolist()
        if 2 * chunks >= _SLOTS or held + len(words) > len(self._learned.hashes):
            self._learned.keys[:] = 0
            self._learned.used[:] = 0
        if len(words) > len(self._learned.hashes):
            self._learned = _new_memory(_SLOTS, 2 * len(words))
        _learn(self._learned, chunk, words)


def _learn(memory: _Memory, chunk: str, words: Iterable[str]) -> None:
    rows = np.array([(len(word.encode()), _facts_of(word)) for word in words], np.int64)
    _remember(memory, np.frombuffer(chunk.encode(), np.uint8), rows)


@lru_cache(1 << 14)
def _facts_of(word: str) -> int:
    """All that is known of a word but its hash."""
    if word.isascii() and word.isalpha() and word not in STOP_WORDS:
        return len(word) << CHARS_SHIFT | LETTER | VISIBLE
    points = [ord(char) for char in word]
    flags = VISIBLE * any(point not in _INVISIBLE for point in points)
    flags |= LETTER * any(map(str.isalpha, word))
    flags |= ENDS_SENTENCE * (len(word) == 1 and points[0] in SENTENCE_ENDS)
    flags |= PUNCTUATION * all(unicodedata.category(char)[0] == "P" for char in word)
    stop = STOP_WORDS.index(word) + 1 if word in STOP_WORDS else 0
    return len(word) << CHARS_SHIFT | stop << STOP_SHIFT | flags


def _kinds() -> Bytes:
    kinds = np.full(256, _OTHER, np.uint8)
    kinds[0x80:] = _WIDE
    for chars, kind in (
        ("abcdefghijklmnopqrstuvwxyz", _LOWER),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", _UPPER),
        ("0123456789", _DIGIT),
        (",;:!?)]\"'", _MARK),
        (".", _DOT),
        (" \t\n\v\f\r\x1c\x1d\x1e\x1f", _SPACE),
    ):
        kinds[list(chars.encode())] = kind
    return kinds


def _pair_kinds() -> Bytes:
    kinds = np.zeros(256, np.uint8)
    kinds[list(b")]\"'")] = 1
    kinds[list(b".,!?")] = 2
    return kinds


_KINDS = _kinds()
_PAIR_KINDS = _pair_kinds()
"""Of the marks that stand in pairs: 1 closes a bracket or quotation, 2 ends a part of a sentence."""
_MARKS: Facts = np.array([_facts_of(chr(byte)) for byte in range(128)], np.int64)
"""Facts of the words that are one ASCII character."""


@njit(cache=True)
def _hash(text: Bytes, start: Any, end: Any) -> Any:
    value = FNV_START
    for at in range(start, end):
        value = (value ^ np.uint64(text[at])) * FNV_PRIME
    return value


@njit(cache=True)
def _find(keys: Hashes, stretches: NDArray[np.int64], value: Any) -> Any:
    """The stretch of the chunk with this hash; 0: it is not known."""
    key = mix(value) | np.uint64(1)
    mask = np.uint64(len(keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while keys[slot] != 0:
        if keys[slot] == key:
            return stretches[slot]
        slot = (slot + np.uint64(1)) & mask
    return np.int64(0)


@njit(cache=True)
def _remember(memory: Any, chunk: Bytes, rows: NDArray[np.int64]) -> None:
    """Adds a chunk; a row is the bytes and facts of a word."""
    key = mix(_hash(chunk, 0, len(chunk))) | np.uint64(1)
    mask = np.uint64(len(memory.keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while memory.keys[slot] != 0:
        slot = (slot + np.uint64(1)) & mask
    word = memory.used[1]
    memory.keys[slot] = key
    memory.stretches[slot] = word << 32 | len(rows)
    start = 0
    for index in range(len(rows)):
        end = start + rows[index, 0]
        memory.hashes[word + index] = mix(_hash(chunk, start, end))
        memory.facts[word + index] = rows[index, 1]
        start = end
    memory.used[0] += 1
    memory.used[1] += len(rows)


@njit(cache=True)
def _copy(known: Hashes, known_facts: Facts, stretch: Any, words: Any, hashes: Hashes, facts: Facts) -> Any:
    first = stretch >> 32
    for index in range(stretch & 0xFFFFFFFF):
        hashes[words] = known[first + index]
        facts[words] = known_facts[first + index]
        words += 1
    return words


@njit(cache=True)
def _skip_spaces(text: Bytes, at: Any) -> tuple[Any, Any]:
    """Where the next chunk begins, and whether a line ends before it."""
    size, breaks = len(text), False
    while at < size:
        width = space_width(text, at)
        if width == 0:
            break
        byte, last = text[at], text[at + width - 1]
        if width == 1:
            breaks = breaks or (byte != 32 and byte != 9 and byte != 31)
        else:
            breaks = breaks or (byte == 0xC2 and last == 0x85) or (byte == 0xE2 and 0xA8 <= last <= 0xA9)
        at += width
    return at, breaks


@njit(cache=True)
def _is_plain_letter(text: Bytes, at: Any) -> bool:
    """The letters of two bytes of western and central Europe and of Russian; all others are left to the full rules."""
    lead = text[at]
    if lead == 0xC3:
        return text[at + 1] != 0x97 and text[at + 1] != 0xB7
    return lead == 0xC4 or lead == 0xC5 or lead == 0xD0 or (lead == 0xD1 and text[at + 1] < 0x90)


@njit(cache=True)
def _scan_core(text: Bytes, at: Any) -> tuple[Any, Any, Any, bool]:
    """A run of digits or of letters from a place: its end, hash and length in characters, and whether it is digits."""
    size, value, beyond, start = len(text), FNV_START, 0, at
    if _KINDS[text[at]] == _DIGIT:
        while at < size and _KINDS[text[at]] == _DIGIT:
            value = (value ^ np.uint64(text[at])) * FNV_PRIME
            at += 1
        return at, value, at - start, True
    while at < size:
        kind = _KINDS[text[at]]
        if kind != _LOWER and kind != _UPPER:
            if kind != _WIDE or not _is_plain_letter(text, at):
                break
            value = (value ^ np.uint64(text[at])) * FNV_PRIME
            at += 1
            beyond += 1
        value = (value ^ np.uint64(text[at])) * FNV_PRIME
        at += 1
    return at, value, at - start - beyond, False


@njit(cache=True)
def _is_cut_off(text: Bytes, start: Any, core: Any) -> bool:
    """Whether a dot after a run of letters or digits is a word of its own: not after a single capital."""
    before = _KINDS[text[core - 1]]
    if before == _UPPER:
        return core - start > 1 and _KINDS[text[core - 2]] == _UPPER
    return before in (_LOWER, _DIGIT)


@njit(cache=True)
def _put(text: Bytes, at: Any, words: Any, hashes: Hashes, facts: Facts) -> Any:
    """Adds one ASCII character as a word."""
    hashes[words] = mix((FNV_START ^ np.uint64(text[at])) * FNV_PRIME)
    facts[words] = _MARKS[text[at]]
    return words + 1


@njit(cache=True)
def _scan_marks(text: Bytes, core: Any) -> Any:
    """End of the at most two marks behind a run of letters or digits, when each is a word of its own; -1: not so sure.

    Two marks must be a bracket or quotation mark and one that ends a part of a sentence: no two of those make a face.
    """
    size, at = len(text), core
    while at < size and at - core < 3 and (_KINDS[text[at]] == _MARK or _KINDS[text[at]] == _DOT):
        at += 1
    if at < size and _KINDS[text[at]] != _SPACE:
        return -1
    if at - core <= 1:
        return at
    pair = _PAIR_KINDS[text[core]] + _PAIR_KINDS[text[core + 1]]
    return at if at - core == 2 and pair == 3 else -1


@njit(cache=True)
def _cut_plain(
    text: Bytes,
    lead: Any,
    words: Any,
    hashes: Hashes,
    facts: Facts,
    keys: Any,
    stretches: Any,
    known: Any,
    known_facts: Any,
) -> tuple[Any, Any]:
    """Cuts a chunk of plain parts: perhaps an opening mark, letters or digits with hyphens between, perhaps marks.

    Gives its end, and the words so far. End -1: the chunk is not of that shape, or a fixed one may be hidden in it.
    """
    size, at = len(text), lead
    if (text[at] == 40 or text[at] == 34) and at + 1 < size:  # an opening bracket or quotation mark
        words = _put(text, at, words, hashes, facts)
        at += 1
    begin, joined = at, False
    while True:
        start = at
        at, value, chars, digits = _scan_core(text, start)
        if at == start:
            return -1, words
        if at + 1 >= size or text[at] != 45:
            break
        after = _KINDS[text[at + 1]]
        if after == _DIGIT:
            if not digits:
                return -1, words
        elif after != _LOWER and after != _UPPER and not (after == _WIDE and _is_plain_letter(text, at + 1)):
            return -1, words
        stretch = _find(keys, stretches, value) if chars <= 4 else np.int64(0)
        facts[words] = chars << CHARS_SHIFT | (VISIBLE if digits else VISIBLE | LETTER)
        if stretch & 0xFFFFFFFF == 1:
            facts[words] = known_facts[stretch >> 32]
        hashes[words] = mix(value)
        words = _put(text, at, words + 1, hashes, facts)
        at += 1
        joined = True
    core, end = at, _scan_marks(text, at)
    if end < 0:
        return -1, words
    dotted = end > core and text[core] == 46
    if dotted and not _is_cut_off(text, start, core):
        return -1, words
    stretch = np.int64(0)
    if core - start <= 12:
        if end > core:
            marked = (value ^ np.uint64(text[core])) * FNV_PRIME
            stretch = _find(keys, stretches, marked)
            if stretch and (joined or end - core > 1 or start > lead):
                return -1, words
        if stretch:
            core = end
        else:
            stretch = _find(keys, stretches, value)
            if stretch and (dotted or (joined and stretch & 0xFFFFFFFF > 1)):
                return -1, words
        with_lead, with_both = _hash(text, lead, core), _hash(text, lead, min(core + 1, end))
        if start > lead and (_find(keys, stretches, with_lead) or _find(keys, stretches, with_both)):
            return -1, words
        if joined and _find(keys, stretches, _hash(text, begin, core)):
            return -1, words
    if stretch:
        words = _copy(known, known_facts, stretch, words, hashes, facts)
    else:
        hashes[words] = mix(value)
        facts[words] = chars << CHARS_SHIFT | (VISIBLE if digits else VISIBLE | LETTER)
        words += 1
    for place in range(core, end):
        words = _put(text, place, words, hashes, facts)
    return end, words


@njit(cache=True)
def _split(
    text: Bytes, at: Any, words: Any, hashes: Hashes, facts: Facts, fixed: Any, learned: Any
) -> tuple[Any, Any, Any]:
    """Splits from a byte on. Gives where it stopped, the words so far, and the end of the chunk it does not know or -1.

    It stops before the white space in front of that chunk, to see it again.
    """
    size = len(text)
    # Arrays, not the tuples that hold them: a tuple handed on costs the counting of its references, twice the time.
    keys, stretches, known, known_facts = fixed.keys, fixed.stretches, fixed.hashes, fixed.facts
    new_keys, new_stretches, new_known, new_facts = learned.keys, learned.stretches, learned.hashes, learned.facts
    while True:
        back, breaks = at, False
        if at + 1 < size and text[at] == 32 and _KINDS[text[at + 1]] < _SPACE:
            at += 1
        else:
            at, breaks = _skip_spaces(text, at)
            if at == size:
                return at, words, -1
        lead, first = at, words
        core, value, chars, digits = _scan_core(text, at)
        kind = _KINDS[text[core]] if core < size else _SPACE
        if kind == _SPACE or (kind == _MARK and (core + 1 == size or _KINDS[text[core + 1]] == _SPACE)):
            # What two chunks of three are, here and not in a function of its own: that is half the time.
            at = core + (kind == _MARK)
            marked = (value ^ np.uint64(text[core])) * FNV_PRIME if at > core else value
            stretch = np.int64(0)
            if chars <= 12:
                stretch = _find(keys, stretches, marked)
                if stretch:
                    core = at
                elif at > core:
                    stretch = _find(keys, stretches, value)
            if stretch:
                words = _copy(known, known_facts, stretch, words, hashes, facts)
            elif core > lead:
                hashes[words] = mix(value)
                facts[words] = chars << CHARS_SHIFT | (VISIBLE if digits else VISIBLE | LETTER)
                words += 1
            if at > core:
                hashes[words] = mix((FNV_START ^ np.uint64(text[core])) * FNV_PRIME)
                facts[words] = _MARKS[text[core]]
                words += 1
        else:
            at, words = _cut_plain(text, lead, first, hashes, facts, keys, stretches, known, known_facts)
        if at < 0:
            at, value = lead, FNV_START
            while at < size and (32 < text[at] < 0xC2 or not space_width(text, at)):
                value = (value ^ np.uint64(text[at])) * FNV_PRIME
                at += 1
            stretch = _find(keys, stretches, value)
            if stretch:
                words = _copy(known, known_facts, stretch, first, hashes, facts)
            else:
                stretch = _find(new_keys, new_stretches, value)
                if not stretch:
                    return back, first, at
                words = _copy(new_known, new_facts, stretch, first, hashes, facts)
        if breaks:
            facts[first] |= STARTS_LINE
        if lead - back > 1 or (lead > back and text[back] != 32):
            facts[first] |= AFTER_SPACES
