"""What the quality rules look at, measured over the UTF-8 bytes of one document by compiled loops.

A word is a run of anything but white space. Costs about 20 MB/s per core; the first use on a machine compiles for some
seconds and is kept on disk after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

_FNV_START = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
TOP_GRAMS = (2, 3, 4)
REPEATED_GRAMS = (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True)
class Measures:
    """Counts and shares of one document. Lines are those that are not blank; lengths are in characters."""

    top_gram_shares: tuple[float, ...]
    """Share of characters in the commonest 2-, 3- and 4-gram of words."""
    repeated_gram_shares: tuple[float, ...]
    """Share of characters in 5- to 10-grams of words that stood before."""
    chars: int
    lines: int
    longest_line_chars: int
    line_chars: int
    """Characters of all lines, white space at their ends not counted."""
    bullet_lines: int
    ellipsis_lines: int
    repeated_lines: int
    """Lines that stood before in the document."""
    repeated_line_chars: int
    paragraphs: int
    repeated_paragraphs: int
    repeated_paragraph_chars: int
    words: int
    word_chars: int
    words_with_letter: int
    stop_words: int
    """How many of the eight commonest English words occur."""
    letters: int
    hashes: int
    """Marks #."""
    ellipses: int
    sentences: int


def measure(data: bytes) -> Measures:
    """Measures one document's UTF-8 bytes. They must be valid."""
    text = np.frombuffer(data, np.uint8)
    lines, paragraphs = _scan_lines(text)
    words, hashes, lengths = _scan_words(text, _STOP_HASHES)
    chars = max(1, int(lines[0]))
    counts: list[Any] = np.concatenate([lines, paragraphs, words]).tolist()
    top = tuple(_top_gram_chars(hashes, lengths, size) / chars for size in TOP_GRAMS)
    repeated = tuple(_repeated_gram_chars(hashes, lengths, size) / chars for size in REPEATED_GRAMS)
    return Measures(top, repeated, *counts)


def _word_hash(word: str) -> int:
    value = int(_FNV_START)
    for byte in word.encode():
        value = (value ^ byte) * int(_FNV_PRIME) % 2**64
    return value


_STOP_HASHES: Hashes = np.array([_word_hash(word) for word in _STOP_WORDS], np.uint64)


@njit(cache=True)
def _new_table(count: int) -> tuple[Hashes, NDArray[np.int64]]:
    """An empty hash table with room for `count` keys: keys (0 is free) and counts."""
    size = 16
    while size < 2 * count:
        size *= 2
    return np.zeros(size, np.uint64), np.zeros(size, np.int64)


@njit(cache=True)
def _count(table: tuple[Hashes, NDArray[np.int64]], key: Any) -> int:
    """Counts a key once more and returns its count."""
    keys, counts = table
    key = key | np.uint64(1)
    mask = np.uint64(len(keys) - 1)
    place = (key >> np.uint64(7)) & mask
    while keys[place] != 0 and keys[place] != key:
        place = (place + np.uint64(1)) & mask
    keys[place] = key
    counts[place] += 1
    return counts[place]


@njit(cache=True)
def _is_space(byte: Any) -> bool:
    return byte == 32 or 9 <= byte <= 13


@njit(cache=True)
def _ends_with_ellipsis(text: Bytes, end: int) -> bool:
    if end >= 3 and text[end - 1] == 46 and text[end - 2] == 46 and text[end - 3] == 46:
        return True
    return end >= 3 and text[end - 3] == 0xE2 and text[end - 2] == 0x80 and text[end - 1] == 0xA6


@njit(cache=True)
def _scan_lines(text: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The fields of Measures from `chars` to `repeated_line_chars`, and the three of paragraphs."""
    size = len(text)
    breaks = 1
    for byte in text:
        breaks += byte == 10
    seen_lines, seen_paragraphs = _new_table(breaks), _new_table(breaks)
    lines, paragraphs = np.zeros(8, np.int64), np.zeros(3, np.int64)
    paragraph, paragraph_chars, start = _FNV_START, 0, 0
    for at in range(size + 1):
        if at < size and text[at] != 10:
            continue
        first, end = start, at
        while first < end and _is_space(text[first]):
            first += 1
        while end > first and _is_space(text[end - 1]):
            end -= 1
        chars, value = 0, _FNV_START
        for place in range(first, end):
            chars += (text[place] & 0xC0) != 0x80
            value = (value ^ np.uint64(text[place])) * _FNV_PRIME
        lines[0] += chars + (first - start) + (at - end) + (at < size)
        lines[2] = max(lines[2], chars + first - start)
        if end > first:
            lines[1] += 1
            lines[3] += chars
            bullet = text[first] == 45 or text[first] == 42
            if end - first >= 3 and text[first] == 0xE2 and text[first + 1] == 0x80 and text[first + 2] == 0xA2:
                bullet = True
            lines[4] += bullet
            lines[5] += _ends_with_ellipsis(text[first:end], end - first)
            if _count(seen_lines, value ^ (value >> _SHIFT)) > 1:
                lines[6] += 1
                lines[7] += chars
            paragraph = (paragraph ^ value) * _MIX
            paragraph_chars += chars
        if paragraph_chars and (end == first or at == size):
            paragraphs[0] += 1
            if _count(seen_paragraphs, paragraph ^ (paragraph >> _SHIFT)) > 1:
                paragraphs[1] += 1
                paragraphs[2] += paragraph_chars
            paragraph, paragraph_chars = _FNV_START, 0
        start = at + 1
    return lines, paragraphs


@njit(cache=True)
def _code_point(text: Bytes, at: int) -> tuple[Any, int]:
    """The character at a place and how many bytes it has."""
    byte = np.int64(text[at])
    if byte < 0x80:
        return byte, 1
    if byte < 0xE0:
        return (byte & 31) << 6 | (text[at + 1] & 63), 2
    if byte < 0xF0:
        return (byte & 15) << 12 | np.int64(text[at + 1] & 63) << 6 | (text[at + 2] & 63), 3
    upper = (byte & 7) << 18 | np.int64(text[at + 1] & 63) << 12
    return upper | np.int64(text[at + 2] & 63) << 6 | (text[at + 3] & 63), 4


@njit(cache=True)
def _is_wide_space(point: Any) -> bool:
    if point < 0x80:
        return point == 32 or 9 <= point <= 13 or 28 <= point <= 31
    if point < 0x2000:
        return point in (0x85, 0xA0, 0x1680)
    return point <= 0x200A or point in (0x2028, 0x2029, 0x202F, 0x205F, 0x3000)


@njit(cache=True)
def _is_letter(point: Any) -> bool:
    """Letters of any script, by block: signs, arrows, punctuation and emoji are told apart, rare marks are not."""
    if point < 0x80:
        return 65 <= (point & ~32) <= 90
    if point < 0xC0:
        return point in (0xAA, 0xB5, 0xBA)
    if point in (0xD7, 0xF7):
        return False
    if 0x2000 <= point < 0x2C00 or 0x3000 <= point < 0x3040 or 0xFE00 <= point < 0xFF21:
        return False
    return not 0x1F000 <= point < 0x20000


@njit(cache=True)
def _starts_ellipsis(text: Bytes, at: int) -> bool:
    if at + 2 >= len(text) or text[at + 1] != 46 or text[at + 2] != 46:
        return False
    return at == 0 or text[at - 1] != 46


@njit(cache=True)
def _scan_words(text: Bytes, stop_hashes: Hashes) -> tuple[NDArray[np.int64], Hashes, NDArray[np.int64]]:
    """The fields of Measures from `words` to `sentences`, and the hash and length of every word."""
    size = len(text)
    found = np.zeros(8, np.int64)
    hashes, lengths = np.empty(size // 2 + 1, np.uint64), np.empty(size // 2 + 1, np.int64)
    stops_seen = np.zeros(len(stop_hashes), np.bool_)
    value, core, chars, has_letter, ended = _FNV_START, _FNV_START, 0, False, False
    at = 0
    while at <= size:
        point, width = _code_point(text, at) if at < size else (32, 1)
        if _is_wide_space(point):
            if chars:
                word = found[0]
                hashes[word], lengths[word] = value ^ (value >> _SHIFT), chars
                found[0] += 1
                found[1] += chars
                found[2] += has_letter
                found[7] += ended
                for index in range(len(stop_hashes)):
                    if core == stop_hashes[index]:
                        stops_seen[index] = True
            value, core, chars, has_letter, ended = _FNV_START, _FNV_START, 0, False, False
        else:
            letter = _is_letter(point)
            found[4] += letter
            has_letter = has_letter or letter
            chars += 1
            for place in range(at, at + width):
                byte = np.uint64(text[place])
                value = (value ^ byte) * _FNV_PRIME
                if letter:
                    core = (core ^ (byte | np.uint64(32) if width == 1 else byte)) * _FNV_PRIME
            found[5] += point == 35
            found[6] += point == 0x2026 or (point == 46 and _starts_ellipsis(text, at))
            if point in (33, 46, 63, 0x3002, 0xFF01, 0xFF1F):
                ended = True
            elif point not in (34, 39, 41, 93, 0x2019, 0x201D):  # closing quotes and brackets follow the mark
                ended = False
        at += width
    found[3] = np.sum(stops_seen)
    return found, hashes[: found[0]], lengths[: found[0]]


@njit(cache=True)
def _gram(hashes: Hashes, start: int, size: int) -> Any:
    value = np.uint64(0)
    for place in range(start, start + size):
        value = (value + hashes[place]) * _MIX
    return value ^ (value >> _SHIFT)


@njit(cache=True)
def _top_gram_chars(hashes: Hashes, lengths: NDArray[np.int64], size: int) -> Any:
    """Characters in all occurrences of the commonest n-gram; of two as common, the longer."""
    grams = len(hashes) - size + 1
    if grams < 2:
        return 0
    table = _new_table(grams)
    most, longest = 1, np.int64(0)
    for start in range(grams):
        count = _count(table, _gram(hashes, start, size))
        if count < most or count < 2:
            continue
        length = size - 1 + np.sum(lengths[start : start + size])
        longest = length if count > most else max(longest, length)
        most = count
    return most * longest


@njit(cache=True)
def _repeated_gram_chars(hashes: Hashes, lengths: NDArray[np.int64], size: int) -> Any:
    """Characters in n-grams that stood before, none counted twice."""
    grams = len(hashes) - size + 1
    table = _new_table(max(1, grams))
    chars, start = np.int64(0), 0
    while start < grams:
        if _count(table, _gram(hashes, start, size)) > 1:
            chars += np.sum(lengths[start : start + size])
            start += size
        else:
            start += 1
    return chars
