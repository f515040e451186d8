"""Rules on the lines of a page: C4's (Raffel et al. 2020) and FineWeb's (Penedo et al. 2024), and Gopher's on lists.

Lines end where Python's `str.splitlines` says, except for FineWeb's, which end at line feeds. Compiled loops over UTF-8
bytes, 400-700 MB/s per core and look.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.measures import Bytes, count_chars, find_or_add, hash_bytes, slot_mask, space_width, trim
from raymill.corpus.word_facts import AFTER_SPACES, ENDS_SENTENCE, PUNCTUATION, STARTS_LINE, TERMINAL_MARKS, Facts

LOREM_IPSUM, CURLY_BRACKET = 1, 2
FEW_ENDED_LINES, SHORT_LINES, REPEATED_LINES, LIST_OF_LINES = range(1, 5)
_NOTICES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
NOTICES, LOREM, CURLY, BRACKET = 1, 2, 4, 8
"""What a page may hold, see `Marks.holds`: cookie and JavaScript notices, lorem ipsum, { and [."""
_LONGEST_WORD_CHARS = 1000
_LEAST_LINE_WORDS = 3


def _as_rows(texts: tuple[str, ...]) -> Bytes:
    rows = np.zeros((len(texts), max(map(len, texts))), np.uint8)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = list(text.encode())
    return rows


class Marks(NamedTuple):
    """What is counted in one look at every byte."""

    line_feeds: int
    blank_lines: int
    """Line feeds that follow another."""
    hashes: int
    """Marks #."""
    ellipses: int
    holds: int
    """NOTICES, LOREM, CURLY, BRACKET or none of them."""


_NOTICE_ROWS = _as_rows((*_NOTICES, "javascript"))
_LOREM_ROWS = _as_rows(("lorem ipsum",))
_HINT_ROWS = _as_rows(("javascript", "cookies", "policy", "terms of use", "lorem ipsum"))
_CITATION_ROWS = _as_rows(("[edit]", "[citation needed]"))
_TERMINALS: NDArray[np.int64] = np.array(sorted(TERMINAL_MARKS), np.int64)


def _rare_bytes() -> Bytes:
    """Per byte: 1-5 the letter to know a row of `_HINT_ROWS` by, after how many others; then signs of their own."""
    kinds = np.zeros(256, np.uint8)
    for kind, chars in enumerate(("jJ", "kK", "yY", "fF", "pP", "{", "[", "#", ".", "\n"), start=1):
        kinds[list(chars.encode())] = kind
    kinds[0xE2] = 11
    return kinds


_RARE = _rare_bytes()
_LETTERS_BEFORE = np.array([0, 0, 3, 5, 7, 7], np.int64)


@njit(cache=True)
def scan_marks(text: Bytes) -> tuple[Any, Any, Any, Any, Any]:
    """The fields of `Marks`."""
    line_feeds, blank_lines, hashes, ellipses, holds, free = 0, 0, 0, 0, 0, 0
    size = len(text)
    for at in range(size):
        kind = _RARE[text[at]]
        if kind == 0:
            continue
        if kind == 10:
            line_feeds += 1
            blank_lines += at > 0 and text[at - 1] == 10
        elif kind == 9:
            if at >= free and at + 2 < size and text[at + 1] == 46 and text[at + 2] == 46:
                ellipses += 1
                free = at + 3
        elif kind <= 5:
            start = at - _LETTERS_BEFORE[kind]
            if start >= 0 and _stands_at(text, start, size, _HINT_ROWS[kind - 1]):
                holds |= LOREM if kind == 5 else NOTICES
        elif kind == 6:
            holds |= CURLY
        elif kind == 7:
            holds |= BRACKET
        elif kind == 8:
            hashes += 1
        else:
            ellipses += at + 2 < size and text[at + 1] == 0x80 and text[at + 2] == 0xA6
    return line_feeds, blank_lines, hashes, ellipses, holds


@njit(cache=True)
def find_lines(text: Bytes) -> NDArray[np.int64]:
    """Start and end of every line, white space at its ends included."""
    size, count = len(text), 1
    for at in range(size):
        byte = text[at]
        count += (10 <= byte <= 13) | (28 <= byte <= 30) | (byte == 0xC2) | (byte == 0xE2)
    lines = np.empty((count, 2), np.int64)
    found, start, at = 0, 0, 0
    while at < size:
        byte = text[at]
        if 31 <= byte < 0xC2:  # most bytes
            at += 1
            continue
        width = 0
        if byte < 0x80:
            if 10 <= byte <= 13 or 28 <= byte <= 30:
                width = 2 if byte == 13 and at + 1 < size and text[at + 1] == 10 else 1
        elif byte == 0xC2:
            width = 2 * (text[at + 1] == 0x85)
        elif byte == 0xE2:
            width = 3 * (text[at + 1] == 0x80 and 0xA8 <= text[at + 2] <= 0xA9)
        if width:
            lines[found, 0], lines[found, 1] = start, at
            found += 1
            start = at + width
        at += max(1, width)
    if start < size:
        lines[found, 0], lines[found, 1] = start, size
        found += 1
    return lines[:found]


@njit(cache=True)
def count_marked_lines(text: Bytes) -> tuple[Any, Any, Any]:
    """Lines, those that begin with a bullet or a dash, and those that end with an ellipsis."""
    lines = find_lines(text)
    bullets, ellipses = 0, 0
    for index in range(len(lines)):
        first, end = trim(text, lines[index, 0], lines[index, 1])
        if end == first:
            continue
        wide = end - first >= 3
        bullets += text[first] == 45 or (
            wide and text[first] == 0xE2 and text[first + 1] == 0x80 and text[first + 2] == 0xA2
        )
        ellipses += _ends_with_dots(text, first, end) or (
            wide and text[end - 3] == 0xE2 and text[end - 2] == 0x80 and text[end - 1] == 0xA6
        )
    return len(lines), bullets, ellipses


@njit(cache=True)
def _ends_with_dots(text: Bytes, start: Any, end: Any) -> bool:
    return end - start >= 3 and text[end - 1] == 46 and text[end - 2] == 46 and text[end - 3] == 46


@njit(cache=True)
def _stands_at(text: Bytes, at: Any, end: Any, row: Bytes) -> int:
    """Length of the needle when it stands there in any case, else 0."""
    length = 0
    while length < len(row) and row[length] != 0:
        if at + length >= end:
            return 0
        byte = text[at + length]
        if (byte | 32 if 65 <= byte <= 90 else byte) != row[length]:
            return 0
        length += 1
    return length


@njit(cache=True)
def _holds(text: Bytes, start: Any, end: Any, rows: Bytes) -> bool:
    for at in range(start, end):
        for index in range(len(rows)):
            if _stands_at(text, at, end, rows[index]):
                return True
    return False


@njit(cache=True)
def _citation_width(text: Bytes, at: Any, end: Any) -> Any:
    """Bytes of a citation mark of Wikipedia that begins with the bracket there; 0: it is none."""
    stop = at + 1
    while stop < end and 48 <= text[stop] <= 57:
        stop += 1
    if stop < end and text[stop] == 93:
        return stop + 1 - at
    for index in range(len(_CITATION_ROWS)):
        length = _stands_at(text, at, end, _CITATION_ROWS[index])
        for place in range(length):
            if text[at + place] != _CITATION_ROWS[index, place]:  # these stand in small letters only
                length = 0
        if length:
            return length
    return 0


@njit(cache=True)
def _has_words(text: Bytes, start: Any, end: Any) -> bool:
    """Whether the line has words enough."""
    words, at = 0, start
    while at < end:
        while at < end and space_width(text, at):
            at += space_width(text, at)
        words += at < end
        if words == _LEAST_LINE_WORDS:
            return True
        while at < end and not space_width(text, at):
            at += 1
    return False


@njit(cache=True)
def _has_long_word(text: Bytes, start: Any, end: Any) -> bool:
    """Whether a word is too long. Looks for white space from far ahead back, so at few bytes of a usual line."""
    at = start
    while end - at > _LONGEST_WORD_CHARS:
        ahead = at + _LONGEST_WORD_CHARS
        while ahead >= at and not space_width(text, ahead):
            ahead -= 1
        if ahead < at:
            ahead = at + _LONGEST_WORD_CHARS
            while ahead < end and not space_width(text, ahead):
                ahead += 1
            if count_chars(text, at, ahead) > _LONGEST_WORD_CHARS:
                return True
        at = ahead + 1
    return False


@njit(cache=True)
def _copy_line(text: Bytes, start: Any, end: Any, kept: Bytes, size: Any, cited: bool) -> Any:
    """Copies a line without its citation marks and gives the new size."""
    if not cited:
        kept[size : size + end - start] = text[start:end]
        return size + end - start
    at = start
    while at < end:
        width = _citation_width(text, at, end) if text[at] == 91 else 0
        at += width
        if width == 0:
            kept[size] = text[at]
            size += 1
            at += 1
    return size


@njit(cache=True)
def _cut_lines(text: Bytes, kept: Bytes, holds: Any, terminal: bool) -> tuple[Any, Any, Any, Any]:
    """Fills `kept`; gives its size, which lines of words stay, whether one of these was edited, and a reason or 0."""
    lines = find_lines(text)
    stays = np.zeros(len(lines), np.uint8)
    size, worded, edited = 0, 0, False
    for index in range(len(lines)):
        start, end = trim(text, lines[index, 0], lines[index, 1])
        if start == end:
            continue
        worded += 1
        if _has_long_word(text, start, end):
            continue
        first = size + 1 if size else 0
        stop = _copy_line(text, start, end, kept, first, holds & BRACKET != 0)
        if terminal:
            last = kept[stop - 1] if stop > first else 0
            ended = last == 46 or last == 63 or last == 33 or last == 34 or last == 39
            if not ended or _ends_with_dots(kept, first, stop):
                continue
        if not _has_words(text, start, end):
            continue
        if holds & LOREM and _holds(kept, first, stop, _LOREM_ROWS):
            return 0, stays[:worded], edited, LOREM_IPSUM
        if holds & NOTICES and _holds(kept, first, stop, _NOTICE_ROWS[6:]):
            continue
        if holds & CURLY:
            for at in range(first, stop):
                if kept[at] == 123:
                    return 0, stays[:worded], edited, CURLY_BRACKET
        if holds & NOTICES and _holds(kept, first, stop, _NOTICE_ROWS[:6]):
            continue
        if size:
            kept[size] = 10
        size = stop
        stays[worded - 1] = 1
        edited = edited or stop - first != end - start
    return size, stays[:worded], edited, 0


class LinesLeft(NamedTuple):
    """What C4's rules on lines leave of a page."""

    text: bytes
    stays: Bytes
    """Per line of words 1 where it stays."""
    edited: bool
    """Whether a citation mark was cut out of a line that stays."""
    reason: int
    """LOREM_IPSUM or CURLY_BRACKET, or 0."""


def cut_lines(text: Bytes, holds: int, terminal: bool) -> LinesLeft:
    """`holds` says what to look for (see `Marks`); lorem ipsum and a curly bracket drop the page."""
    kept = np.empty(len(text) + 1, np.uint8)
    size, stays, edited, reason = _cut_lines(text, kept, holds, terminal)
    return LinesLeft(kept[:size].tobytes(), stays, edited, reason)


@njit(cache=True)
def keep_lines(facts: Facts, stays: Bytes) -> Facts:
    """The words of the lines that stay."""
    left, words, line = np.empty(len(facts), np.int64), 0, -1
    for index in range(len(facts)):
        line += index == 0 or facts[index] & STARTS_LINE != 0
        if stays[line]:
            left[words] = facts[index]
            words += 1
    return left[:words]


@njit(cache=True)
def count_sentences(facts: Facts) -> Any:
    """Sentences of each line: one, and one more for every word that follows an end of a sentence."""
    sentences, ended = 0, False
    for index in range(len(facts)):
        fact = facts[index]
        if index == 0 or fact & STARTS_LINE or (ended and fact & AFTER_SPACES):
            sentences += 1
            ended = False
        if fact & ENDS_SENTENCE:
            ended = True
        elif ended and not fact & PUNCTUATION:
            sentences += 1
            ended = False
    return sentences


@njit(cache=True)
def _judge_page(text: Bytes, chars: Any, words: Any, seen: Any, terminals: Any) -> Any:
    size, breaks = len(text), 0
    for at in range(size):
        breaks += text[at] == 10
    mask = slot_mask(breaks + 1)
    lines, ended, short, repeated = 0, 0, 0, 0
    start = 0
    for at in range(size + 1):
        if at < size and text[at] != 10:
            continue
        first, stop = trim(text, start, at)
        if first < stop:
            lines += 1
            ended += _ends_line(text, start, at, terminals)
            length = count_chars(text, start, at)
            short += length <= 30
            slot = find_or_add(seen, mask, hash_bytes(text, start, at), lines)
            seen.counts[slot] += 1
            if seen.counts[slot] > 1:
                repeated += length
        start = at + 1
    seen.base[0] += lines + 1
    if lines == 0 or ended / lines < 0.12:
        return FEW_ENDED_LINES
    if short / lines > 0.67:
        return SHORT_LINES
    if repeated / (chars - breaks) > 0.01:
        return REPEATED_LINES
    return LIST_OF_LINES if breaks / max(1, words) > 0.3 else 0


@njit(cache=True)
def _ends_line(text: Bytes, start: Any, end: Any, terminals: Any) -> bool:
    """Whether the last character of a stretch is one of the sorted marks."""
    last = end - 1
    while last > start and (text[last] & 0xC0) == 0x80:
        last -= 1
    point = np.int64(text[last])
    if end - last > 1:
        point &= 0xFF >> (end - last + 1)
        for at in range(last + 1, end):
            point = point << 6 | (text[at] & 63)
    place = np.searchsorted(terminals, point)
    return bool(place < len(terminals) and terminals[place] == point)


def judge_page(text: Bytes, chars: int, words: int, seen: Any) -> int:
    """The first of FineWeb's rules that a page breaks, or 0. The table needs room for all lines."""
    return int(_judge_page(text, chars, words, seen, _TERMINALS))
