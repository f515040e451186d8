"""Splits UTF-8 text into words, punctuation marks being words of their own, for rules that count and compare them.

The words are those of spaCy's blank English tokenizer, which the field's filters use. `corpus.chunks` says how a chunk
between white space is cut, `corpus.cutting` does so in compiled loops; here are the two shortcuts that save most of it.
The plain chunks (letters or digits, then at most one mark) are cut in passing, and how any other was cut is remembered.
Nothing of a word is kept but its hash, its length and a few flags. Costs 110 MB/s per core, 0.6 us more for a chunk that
is seen for the first time and is not plain, 0.2 s for the tables, and 13 MB of memory per thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.chunk_memory import copy, find, hash_word, learn_chunk, new_memory, remember
from raymill.corpus.chunks import cut_chunk
from raymill.corpus.cutting import cut, new_tables
from raymill.corpus.measures import FNV_PRIME, FNV_START, Bytes, Hashes, mix, space_width
from raymill.corpus.word_facts import AFTER_SPACES, CHARS_SHIFT, LETTER, STARTS_LINE, VISIBLE, Facts, facts_of

_OTHER, _LOWER, _UPPER, _DIGIT, _MARK, _DOT, _SPACE, _WIDE = range(8)
Numbers = NDArray[np.int64]
_LEARNED_CHUNKS = 1 << 17
_LEARNED_WORDS = 1 << 19


class WordSplitter:
    """Splits texts of one thread; what it remembers makes it faster and changes no result."""

    def __init__(self) -> None:
        self._tables = new_tables()
        self._learned = new_memory(_LEARNED_CHUNKS, _LEARNED_WORDS)
        self._room = _new_room(1 << 12)
        self._hashes, self._facts = np.empty(1 << 14, np.uint64), np.empty(1 << 14, np.int64)

    def split(self, text: Bytes) -> tuple[Hashes, Facts]:
        """Hash and facts of every word; views that the next call overwrites."""
        if len(self._hashes) <= len(text):
            size = 2 * len(text)
            self._hashes, self._facts = np.empty(size, np.uint64), np.empty(size, np.int64)
        at, words, end = 0, 0, 0
        while True:
            at, words, end = _split(
                text, at, words, self._hashes, self._facts, self._learned, *self._room, *self._tables
            )
            if end < 0:
                return self._hashes[:words], self._facts[:words]
            if end - at >= len(self._room[0]):
                self._room = _new_room(2 * (end - at))
            else:
                self._meet(bytes(text[at:end]).decode().strip())

    def _meet(self, chunk: str) -> None:
        """Has the plain rules cut an odd chunk, and remembers it."""
        words = cut_chunk(chunk)
        if 4 * len(words) > len(self._learned.hashes):
            self._learned = new_memory(_LEARNED_CHUNKS, 4 * len(words))
        learn_chunk(self._learned, chunk, words)


def _new_room(size: int) -> tuple[Numbers, Numbers, Numbers]:
    """Room for one chunk of fewer bytes."""
    return np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)


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
_MARKS: Facts = np.array([facts_of(chr(byte)) for byte in range(128)], np.int64)
"""Facts of the words that are one ASCII character."""


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
        stretch = find(keys, stretches, value) if chars <= 4 else np.int64(0)
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
            stretch = find(keys, stretches, marked)
            if stretch and (joined or end - core > 1 or start > lead):
                return -1, words
        if stretch:
            core = end
        else:
            stretch = find(keys, stretches, value)
            if stretch and (dotted or (joined and stretch & 0xFFFFFFFF > 1)):
                return -1, words
        with_lead, with_both = hash_word(text, lead, core), hash_word(text, lead, min(core + 1, end))
        if start > lead and (find(keys, stretches, with_lead) or find(keys, stretches, with_both)):
            return -1, words
        if joined and find(keys, stretches, hash_word(text, begin, core)):
            return -1, words
    if stretch:
        words = copy(known, known_facts, stretch, words, hashes, facts)
    else:
        hashes[words] = mix(value)
        facts[words] = chars << CHARS_SHIFT | (VISIBLE if digits else VISIBLE | LETTER)
        words += 1
    for place in range(core, end):
        words = _put(text, place, words, hashes, facts)
    return end, words


@njit(cache=True)
def _split(
    text: Bytes,
    at: Any,
    words: Any,
    hashes: Hashes,
    facts: Facts,
    learned: Any,
    points: Numbers,
    places: Numbers,
    tails: Numbers,
    flags: Any,
    fixed: Any,
    joins: Any,
    heads: Bytes,
    sizes: Any,
    longest: Any,
) -> tuple[Any, Any, Any]:
    """Splits from a byte on. Gives where it stopped, the words so far, and the end of the chunk it does not know or -1.

    It stops before the white space in front of that chunk, to see it again.
    """
    size = len(text)
    # Arrays, not the tuples that hold them: a tuple handed on costs the counting of its references, twice the time.
    keys, stretches, known, known_facts = fixed.keys, fixed.stretches, fixed.hashes, fixed.facts
    new_keys, new_stretches, new_known, new_facts = learned.keys, learned.stretches, learned.hashes, learned.facts
    join_keys, join_stretches, joined_hashes, joined_facts = joins.keys, joins.stretches, joins.hashes, joins.facts
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
                stretch = find(keys, stretches, marked)
                if stretch:
                    core = at
                elif at > core:
                    stretch = find(keys, stretches, value)
            if stretch:
                words = copy(known, known_facts, stretch, words, hashes, facts)
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
            stretch = find(keys, stretches, value)
            if stretch:
                words = copy(known, known_facts, stretch, first, hashes, facts)
            else:
                stretch = find(new_keys, new_stretches, value)
                if stretch:
                    words = copy(new_known, new_facts, stretch, first, hashes, facts)
                else:
                    if at - back >= len(points):
                        return back, first, at
                    words = cut(
                        text,
                        lead,
                        at,
                        first,
                        hashes,
                        facts,
                        points,
                        places,
                        tails,
                        flags,
                        keys,
                        stretches,
                        known,
                        known_facts,
                        join_keys,
                        join_stretches,
                        joined_hashes,
                        joined_facts,
                        heads,
                        sizes,
                        longest,
                    )
                    if words < 0:
                        return back, first, at
                    remember(learned, value, first, words, hashes, facts)
        if breaks:
            facts[first] |= STARTS_LINE
        if lead - back > 1 or (lead > back and text[back] != 32):
            facts[first] |= AFTER_SPACES
