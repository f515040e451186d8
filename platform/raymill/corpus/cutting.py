"""The rules of `corpus.chunks` as compiled loops over UTF-8 bytes.

In comes a chunk, out come the hashes and facts of its words, the same as of `chunks.cut_chunk`; a test compares them.
Only what may be an unusual address (an IP number, a scheme or a port with characters beyond ASCII) is left to those
rules: `cut` then says so. 0.6 us per chunk, half of it numba's counting of references, where those rules take 17.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.chunk_memory import (
    Memory,
    copy,
    find,
    hash_text,
    hash_word,
    learn_chunk,
    learn_run,
    new_memory,
    run_key,
)
from raymill.corpus.chunks import Classes, classes, exceptions, joined, units
from raymill.corpus.measures import Bytes, Hashes, mix
from raymill.corpus.word_facts import (
    CHARS_SHIFT,
    ENDS_SENTENCE,
    LETTER,
    POINTS,
    PUNCTUATION,
    STOP_WORDS,
    VISIBLE,
    Facts,
    flags_of_points,
)

_PREFIX, _SUFFIX, _INFIX, _SYMBOL, _QUOTE, _LOWER, _UPPER, _ALPHA, _SIGN, _BEFORE_DOT, _NAME = (
    1 << bit for bit in range(4, 15)
)
"""Classes of characters, above the flags of `word_facts`. INFIX: some rule on what stands inside begins with it."""
_LONGEST_UNIT = 4
_HEADS = 1 << 14

Ints = NDArray[np.int64]


class Tables(NamedTuple):
    """What the rules look up; arrays only, and handed to the loops one by one."""

    flags: NDArray[np.uint16]
    """Per code point."""
    fixed: Memory
    """Chunks of fixed words, and the stop words."""
    joined: Memory
    """Runs of words that belong together; by their own hashes also the units."""
    heads: Bytes
    """Bit of the first two words of each run, by the highest bits of their key: 1."""
    sizes: Ints
    """Words in a run, longest first."""
    longest: int
    """Bytes of the longest fixed chunk."""


def new_tables() -> Tables:
    """Takes 0.2 s, the second time half."""
    fixed = {word: (word,) for word in STOP_WORDS} | exceptions()
    texts = {text: words for text, words in fixed.items() if not any(map(str.isspace, text))}
    tables = Tables(
        _class_flags(classes()),
        new_memory(len(texts), sum(map(len, texts.values()))),
        new_memory(len(joined()) + len(units()), len(units()) + sum(map(len, joined().values()))),
        np.zeros(_HEADS, np.uint8),
        np.array(sorted({len(parts) for parts in joined()}, reverse=True), np.int64),
        max(len(text.encode()) for text in texts),
    )
    for text, words in texts.items():
        learn_chunk(tables.fixed, text, words)
    for unit in units():
        learn_chunk(tables.joined, unit, (unit,))
    for parts, words in joined().items():
        learn_run(tables.joined, parts, words)
        tables.heads[_head(parts)] = 1
    return tables


def _class_flags(named: Classes) -> NDArray[np.uint16]:
    flags = flags_of_points().copy()
    dashes, digits = {0x2013, 0x2014}, set(b"0123456789")
    ends = named.mark | named.quote | named.symbol | dashes
    kinds = {
        _PREFIX: ends | named.sign | {0xA7, *b"%="},
        _SUFFIX: ends,
        _INFIX: named.symbol | dashes | {0x2026, *b".+*^-,~:<>=/"},
        _SYMBOL: named.symbol | {0x2026},
        _QUOTE: named.quote,
        _LOWER: named.lower,
        _UPPER: named.upper,
        _ALPHA: named.letter,
        _SIGN: named.sign,
        _BEFORE_DOT: digits | named.lower | named.mark | named.quote | {0xB2, *b"%+|?:)-"},
        _NAME: digits | {point for point in named.letter if point < 0x80},
    }
    for kind, points in kinds.items():
        flags[list(points)] |= kind
    flags[0xA1:0x10000] |= _NAME
    return flags


def _head(parts: tuple[str, ...]) -> int:
    hashes = np.array([hash_text(part) for part in parts[:2]], np.uint64)
    return int(_head_of(hashes, 0))


@njit(cache=True)
def _head_of(hashes: Hashes, first: Any) -> Any:
    return np.int64(run_key(hashes, first, 2) >> np.uint64(50))


@njit(cache=True)
def _decode(text: Bytes, start: Any, end: Any, points: Any, places: Any) -> Any:
    """Code points of a stretch and where each begins, its end behind the last; gives how many.

    Points beyond the tables stand as the last one in them, which no rule names either.
    """
    chars, at = 0, start
    while at < end:
        byte: Any = np.int64(text[at])
        width: Any = 1
        if byte >= 0xC0:
            width = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            byte &= 0xFF >> (width + 1)
            for place in range(at + 1, at + width):
                byte = byte << 6 | np.int64(text[place] & 63)
        points[chars] = min(byte, POINTS - 1)
        places[chars] = at
        chars += 1
        at += width
    places[chars] = end
    return chars


@njit(cache=True)
def _emit(
    text: Bytes,
    points: Any,
    places: Any,
    start: Any,
    end: Any,
    flags: Any,
    keys: Any,
    stretches: Any,
    known_facts: Any,
    words: Any,
    hashes: Any,
    facts: Any,
) -> Any:
    """Adds the characters from `start` to `end` as a word."""
    value = hash_word(text, places[start], places[end])
    some: Any = 0
    every: Any = PUNCTUATION | (ENDS_SENTENCE if end - start == 1 else 0)
    for at in range(start, end):
        each = np.int64(flags[points[at]])
        some |= each
        every &= each
    fact = (end - start) << CHARS_SHIFT | (some & (VISIBLE | LETTER)) | every
    if end - start <= 4 and some & _LOWER:  # perhaps a stop word
        stretch = find(keys, stretches, value)
        if stretch & 0xFFFFFFFF == 1:
            fact = known_facts[stretch >> 32]
    hashes[words] = mix(value)
    facts[words] = fact
    return words + 1


@njit(cache=True)
def _is_digit(point: Any) -> bool:
    return 48 <= point <= 57


@njit(cache=True)
def _prefix_size(points: Any, start: Any, end: Any, flags: Any) -> Any:
    point = points[start]
    if point == 46:
        stop = start + 1
        while stop < end and points[stop] == 46:
            stop += 1
        return stop - start if stop - start > 1 else 0
    if flags[point] & _PREFIX:
        return 1
    if point == 43:
        return 0 if start + 1 < end and _is_digit(points[start + 1]) else 1
    if start + 1 < end and points[start + 1] == 36 and (point == 67 or point == 65):  # C$ A$
        return 2
    if start + 2 < end and point == 85 and points[start + 1] == 83 and points[start + 2] == 36:  # US$
        return 3
    return 0


@njit(cache=True)
def _suffix_size(
    text: Bytes, points: Any, places: Any, start: Any, end: Any, flags: Any, keys: Any, stretches: Any
) -> Any:
    """The longest suffix; what stands before `start` is not looked at."""
    if start >= end:
        return 0
    last, before = points[end - 1], points[end - 2] if end - start > 1 else -1
    if last == 46:
        if before == 46:
            stop = end - 2
            while stop > start and points[stop - 1] == 46:
                stop -= 1
            return end - stop
        if before < 0:
            return 0
        if flags[before] & _BEFORE_DOT:
            return 1
        further = points[end - 3] if end - start > 2 else -1
        if further >= 0 and flags[before] & _UPPER and flags[further] & _UPPER:
            return 1
        degrees = before == 70 or before == 102 or before == 67 or before == 99 or before == 75 or before == 107
        return 1 if degrees and further == 0xB0 else 0
    for size in range(min(_LONGEST_UNIT, end - start - 1), 0, -1):
        if not _is_digit(points[end - size - 1]):
            continue
        first = points[end - size]
        if size == 1 and (last == 43 or flags[last] & _SIGN):
            return 1
        if last == 36 and size == 2 and (first == 67 or first == 65):
            return 2
        if last == 36 and size == 3 and first == 85 and before == 83:
            return 3
        if find(keys, stretches, hash_word(text, places[end - size], places[end])):
            return size
    if last == 0x2026 and before == 0x2026:
        return 2
    if (last == 115 or last == 83) and (before == 39 or before == 0x2019):
        return 2
    return 1 if flags[last] & _SUFFIX else 0


@njit(cache=True)
def _infix_size(points: Any, start: Any, at: Any, end: Any, flags: Any) -> Any:
    """Of what cuts the stretch from `start` to `end` in two, at a place of class INFIX."""
    point = points[at]
    flag = flags[point]
    after = points[at + 1] if at + 1 < end else -1
    if point == 46 and after == 46:
        stop = at + 2
        while stop < end and points[stop] == 46:
            stop += 1
        return stop - at
    if flag & _SYMBOL:
        return 1
    if at == start or after < 0:
        return 0
    before = points[at - 1]
    before_flag, after_flag = flags[before], flags[after]
    if point == 46:
        return 1 if before_flag & (_LOWER | _QUOTE) and after_flag & (_UPPER | _QUOTE) else 0
    counted = _is_digit(before)
    if counted and (point == 43 or point == 42 or point == 94 or point == 45) and (_is_digit(after) or after == 45):
        return 1
    if point == 44:
        return 1 if before_flag & _ALPHA and after_flag & _ALPHA else 0
    if point == 43 or point == 42 or point == 94 or not (counted or before_flag & _ALPHA):
        return 0
    if after_flag & _ALPHA:
        return 1
    # Two or three hyphens, or two dashes, before a letter.
    if after != point or (point != 45 and point != 0x2014) or at + 2 >= end:
        return 0
    if flags[points[at + 2]] & _ALPHA:
        return 2
    if point == 45 and points[at + 2] == 45 and at + 3 < end and flags[points[at + 3]] & _ALPHA:
        return 3
    return 0


@njit(cache=True)
def _ends_host(points: Any, at: Any, end: Any) -> Any:
    """Whether nothing stands there, or a port, a path or both: 1, 0; -1: not so sure."""
    if at < end and points[at] == 58:
        stop = at + 1
        while stop < end and _is_digit(points[stop]):
            stop += 1
        if stop < end and points[stop] >= 0x80:
            return -1
        if not 2 <= stop - at - 1 <= 5:
            return 0
        at = stop
    return 1 if at == end or points[at] == 47 or points[at] == 63 or points[at] == 35 else 0


@njit(cache=True)
def _is_host(points: Any, start: Any, end: Any, flags: Any) -> Any:
    """Whether the stretch is names with dots between, a top-level domain at last, and perhaps more: 1, 0 or -1."""
    at = start
    while True:
        stop = at
        if at > start:
            while stop < end and flags[points[stop]] & _LOWER:
                stop += 1
            if 2 <= stop - at <= 63:
                ends = _ends_host(points, stop, end)
                if ends:
                    return ends
        stop = at
        while stop < end and (flags[points[stop]] & _NAME or points[stop] == 95 or points[stop] == 45):
            stop += 1
        if stop == end or points[stop] != 46 or not 1 <= stop - at <= 64:
            return 0
        if not flags[points[at]] & _NAME or not flags[points[stop - 1]] & _NAME:
            return 0
        at = stop + 1


@njit(cache=True)
def _may_be_address(points: Any, start: Any, end: Any, flags: Any) -> Any:
    """Whether a dot stands before two small letters: 1, 0; -1: before numbers as in an IP number, or unusual digits."""
    found = 0
    for at in range(start + 1, end - 2):
        if points[at] != 46:
            continue
        for place in range(at + 1, at + 3):
            if points[place] >= 0x80 and not flags[points[place]] & (LETTER | _PREFIX):
                return -1
        if flags[points[at + 1]] & flags[points[at + 2]] & _LOWER:
            found = 1
        stop, dots = at + 1, 0
        while stop < end and dots < 2 and (_is_digit(points[stop]) or (points[stop] == 46 and points[stop - 1] != 46)):
            dots += points[stop] == 46
            stop += 1
        if dots == 2 or (stop < end and points[stop] >= 0x80 and not flags[points[stop]] & (LETTER | _PREFIX)):
            return -1
    return found


@njit(cache=True)
def _is_address(points: Any, start: Any, end: Any, flags: Any) -> Any:
    """1, 0; -1: left to the plain rules."""
    found = _may_be_address(points, start, end, flags)
    if found <= 0:
        return found
    found = _is_host(points, start, end, flags)
    if found:
        return found
    scheme, at = True, start
    while at < end:
        point = points[at]
        if point == 64 and at > start:
            scheme = False
            found = _is_host(points, at + 1, end, flags)
        elif scheme and point == 58:
            scheme = False
            if at - start >= 2 and at + 2 < end and points[at + 1] == 47 and points[at + 2] == 47:
                found = _is_host(points, at + 3, end, flags)
        elif point >= 0x80 and scheme:
            for place in range(at, end - 2):
                if points[place] == 58 and points[place + 1] == 47 and points[place + 2] == 47:
                    return -1
            scheme = False
        elif point != 95 and point != 43 and point != 46 and point != 45 and not flags[point] & _NAME:
            scheme = False
        if found:
            return found
        at += 1
    return 0


@njit(cache=True)
def _join(
    first: Any,
    words: Any,
    hashes: Hashes,
    facts: Facts,
    keys: Any,
    known_stretches: Any,
    known: Any,
    known_facts: Any,
    sizes: Ints,
) -> Any:
    """Puts together what the marks parted; the longest run first, of runs as long the first. Gives the number of words."""
    count = words - first
    taken, runs, stretches = np.zeros(count, np.uint8), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for size in sizes:
        for start in range(count - size + 1):
            stretch = find(keys, known_stretches, run_key(hashes, first + start, size))
            if stretch:
                if not taken[start] and not taken[start + size - 1]:
                    runs[start], stretches[start] = size, stretch
                taken[start : start + size] = 1
    parts, part_facts = hashes[first:words].copy(), facts[first:words].copy()
    words, at = first, 0
    while at < count:
        if runs[at]:
            words = copy(known, known_facts, stretches[at], words, hashes, facts)
            at += runs[at]
        else:
            hashes[words], facts[words] = parts[at], part_facts[at]
            words += 1
            at += 1
    return words


@njit(cache=True)
def cut(
    text: Bytes,
    start_byte: Any,
    end_byte: Any,
    words: Any,
    hashes: Hashes,
    facts: Facts,
    points: Any,
    places: Any,
    tails: Any,
    flags: Any,
    keys: Any,
    stretches: Any,
    known: Any,
    known_facts: Any,
    join_keys: Any,
    join_stretches: Any,
    joined_hashes: Any,
    joined_facts: Any,
    heads: Bytes,
    sizes: Ints,
    longest: Any,
) -> Any:
    """Appends the words of a chunk that is no fixed one, and gives the new number of words; -1: left to the plain rules.

    `points`, `places` and `tails` are room for one number more than the chunk has bytes.
    """
    first, start, end = words, 0, _decode(text, start_byte, end_byte, points, places)
    stretch, ends = np.int64(0), 0
    while start < end:
        if places[end] - places[start] <= longest:
            stretch = find(keys, stretches, hash_word(text, places[start], places[end]))
            if stretch:
                break
        prefix = _prefix_size(points, start, end, flags)
        if prefix and places[end] - places[start + prefix] <= longest and start + prefix < end:
            stretch = find(keys, stretches, hash_word(text, places[start + prefix], places[end]))
        suffix = 0
        if not stretch:
            suffix = _suffix_size(text, points, places, start + prefix, end, flags, join_keys, join_stretches)
            if suffix and places[end - suffix] - places[start] <= longest and start < end - suffix:
                stretch = find(keys, stretches, hash_word(text, places[start], places[end - suffix]))
                if stretch:
                    prefix = 0
        if prefix:
            words = _emit(
                text, points, places, start, start + prefix, flags, keys, stretches, known_facts, words, hashes, facts
            )
        if suffix:
            tails[ends] = suffix
            ends += 1
        start, end = start + prefix, end - suffix
        if stretch or not (prefix or suffix):
            break
    if stretch:
        words = copy(known, known_facts, stretch, words, hashes, facts)
    elif start < end:
        address = _is_address(points, start, end, flags)
        if address < 0:
            return -1
        at, begin = start, start
        while at < end and not address:
            size = _infix_size(points, start, at, end, flags) if flags[points[at]] & _INFIX else 0
            if size and at > start:
                if at > begin:
                    words = _emit(
                        text, points, places, begin, at, flags, keys, stretches, known_facts, words, hashes, facts
                    )
                words = _emit(
                    text, points, places, at, at + size, flags, keys, stretches, known_facts, words, hashes, facts
                )
                begin = at + size
            at += max(1, size)
        if begin < end:
            words = _emit(text, points, places, begin, end, flags, keys, stretches, known_facts, words, hashes, facts)
    while ends:
        ends -= 1
        start, end = end, end + tails[ends]
        words = _emit(text, points, places, start, end, flags, keys, stretches, known_facts, words, hashes, facts)
    for at in range(first, words - 1):
        if heads[_head_of(hashes, at)]:
            return _join(first, words, hashes, facts, join_keys, join_stretches, joined_hashes, joined_facts, sizes)
    return words
