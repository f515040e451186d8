"""What the quality rules look at in the lines and characters of a document, measured over its UTF-8 bytes.

Compiled loops; the first use on a machine compiles for some seconds and is kept on disk after that. Repeated lines and
paragraphs cost 400 MB/s per core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

FNV_START = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_CODE_GRAM_WORDS = 10


class Seen(NamedTuple):
    """A hash table that is emptied by moving on: an entry counts when its place is not below the present base."""

    keys: Hashes
    places: NDArray[np.int64]
    """Base + where the key stood first."""
    counts: NDArray[np.int32]
    base: NDArray[np.int64]
    """One number; grows by as many places as were used."""


def new_seen(places: int) -> Seen:
    """Room for that many keys."""
    size = 1 << max(4, (2 * places - 1).bit_length())
    return Seen(np.zeros(size, np.uint64), np.zeros(size, np.int64), np.zeros(size, np.int32), np.ones(1, np.int64))


@njit(cache=True)
def mix(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(32))) * _MIX
    return value ^ (value >> np.uint64(29))


@njit(cache=True)
def slot_mask(keys: Any) -> Any:
    """The mask of a part of a table that is large enough for so many keys, and small enough to stay in the cache."""
    size = 16
    while size < 2 * keys:
        size *= 2
    return np.uint64(size - 1)


@njit(cache=True)
def find_or_add(seen: Any, mask: Any, key: Any, place: Any) -> Any:
    """The slot of a key; a new one gets the place and count 0."""
    base = seen.base[0]
    slot = (key >> np.uint64(7)) & mask
    while seen.places[slot] >= base and seen.keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    if seen.places[slot] < base:
        seen.keys[slot], seen.places[slot], seen.counts[slot] = key, base + place, 0
    return slot


@njit(cache=True)
def space_width(text: Bytes, at: Any) -> Any:
    """Bytes of the white space character at a place; 0: there is none."""
    byte = text[at]
    if byte < 0x80:
        return 1 if byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31 else 0
    if byte == 0xC2:
        return 2 if text[at + 1] == 0x85 or text[at + 1] == 0xA0 else 0
    if byte == 0xE2:
        second, third = text[at + 1], text[at + 2]
        if second == 0x80:
            return 3 if third <= 0x8A or 0xA8 <= third <= 0xA9 or third == 0xAF else 0
        return 3 if second == 0x81 and third == 0x9F else 0
    if byte == 0xE1:
        return 3 if text[at + 1] == 0x9A and text[at + 2] == 0x80 else 0
    if byte == 0xE3:
        return 3 if text[at + 1] == 0x80 and text[at + 2] == 0x80 else 0
    return 0


@njit(cache=True)
def trim(text: Bytes, start: Any, end: Any) -> tuple[Any, Any]:
    """The stretch without white space at its ends."""
    while start < end:
        width = space_width(text, start)
        if width == 0:
            break
        start += width
    while start < end:
        last = end - 1
        while last > start and (text[last] & 0xC0) == 0x80:
            last -= 1
        if space_width(text, last) == 0:
            break
        end = last
    return start, end


@njit(cache=True)
def count_chars(text: Bytes, start: Any, end: Any) -> Any:
    chars = 0
    for at in range(start, end):
        chars += (text[at] & 0xC0) != 0x80
    return chars


@njit(cache=True)
def hash_bytes(text: Bytes, start: Any, end: Any) -> Any:
    """Eight bytes at a time, for stretches longer than a word."""
    value = FNV_START ^ np.uint64(end - start)
    at = start
    while at + 8 <= end:
        eight = np.uint64(0)
        for index in range(8):
            eight |= np.uint64(text[at + index]) << np.uint64(8 * index)
        value = mix(value ^ eight)
        at += 8
    while at < end:
        value = (value ^ np.uint64(text[at])) * FNV_PRIME
        at += 1
    return mix(value)


@njit(cache=True)
def count_repeats(text: Bytes, start: Any, end: Any, breaks: int, seen: Any) -> tuple[Any, Any, Any]:
    """Pieces that `breaks` or more line feeds part: how many, how many stood before, and the characters of those."""
    pieces, repeated, chars = 0, 0, 0
    most = 1
    for at in range(start, end):
        most += text[at] == 10
    mask = slot_mask(most)
    first, at = start, start
    while True:
        while at < end and text[at] != 10:
            at += 1
        stop = at
        while at < end and text[at] == 10:
            at += 1
        if stop < end and at - stop < breaks:
            continue
        slot = find_or_add(seen, mask, hash_bytes(text, first, stop), pieces)
        seen.counts[slot] += 1
        pieces += 1
        if seen.counts[slot] > 1:
            repeated += 1
            chars += count_chars(text, first, stop)
        first = at
        if stop == end:
            break
        if at == end:
            slot = find_or_add(seen, mask, hash_bytes(text, end, end), pieces)
            seen.counts[slot] += 1
            repeated += seen.counts[slot] > 1
            pieces += 1
            break
    seen.base[0] += pieces + 1
    return pieces, repeated, chars


@dataclass(frozen=True)
class CodeMeasures:
    """Counts of one source file. Lines are those that are not blank; lengths are in characters."""

    chars: int
    lines: int
    longest_line_chars: int
    line_chars: int
    """Characters of all lines, white space at their ends not counted."""
    repeated_line_chars: int
    """In lines that stood before in the document."""
    letters: int
    repeated_phrase_chars: int
    """In runs of ten words (here: anything between white space) that stood before."""


def measure_code(data: bytes) -> CodeMeasures:
    """Measures one document's UTF-8 bytes. They must be valid."""
    text = np.frombuffer(data, np.uint8)
    counts: list[Any] = _scan_code(text, new_seen(data.count(b"\n") + 1)).tolist()
    counts.append(int(_repeated_phrase_chars(text, new_seen(len(text) // 2 + 1))))
    return CodeMeasures(*counts)


@njit(cache=True)
def _scan_code(text: Bytes, seen: Any) -> NDArray[np.int64]:
    """The fields of CodeMeasures but the last."""
    found = np.zeros(6, np.int64)
    mask = np.uint64(len(seen.keys) - 1)
    start, size = 0, len(text)
    for at in range(size + 1):
        if at < size and text[at] != 10:
            continue
        first, end = trim(text, start, at)
        found[0] += count_chars(text, start, at) + (at < size)
        if end > first:
            chars = count_chars(text, first, end)
            found[1] += 1
            found[2] = max(found[2], chars + first - start)
            found[3] += chars
            slot = find_or_add(seen, mask, hash_bytes(text, first, end), 0)
            seen.counts[slot] += 1
            if seen.counts[slot] > 1:
                found[4] += chars
        start = at + 1
    for place in range(size):
        byte = text[place]
        # Beyond ASCII every character counts as a letter: in code it is most often in a comment or a name.
        found[5] += byte >= 0xC0 or 65 <= (byte & ~32) <= 90
    return found


@njit(cache=True)
def _repeated_phrase_chars(text: Bytes, seen: Any) -> Any:
    """Characters in 10-grams that stood before, none counted twice."""
    size = len(text)
    hashes, lengths = np.empty(size // 2 + 1, np.uint64), np.empty(size // 2 + 1, np.int64)
    words, at = 0, 0
    while at < size:
        width = space_width(text, at)
        if width:
            at += width
            continue
        start = at
        while at < size and not space_width(text, at):
            at += 1
        hashes[words], lengths[words] = hash_bytes(text, start, at), count_chars(text, start, at)
        words += 1
    mask = np.uint64(len(seen.keys) - 1)
    chars, first = np.int64(0), 0
    while first + _CODE_GRAM_WORDS <= words:
        value = np.uint64(0)
        for place in range(first, first + _CODE_GRAM_WORDS):
            value = (value + hashes[place]) * _MIX
        slot = find_or_add(seen, mask, mix(value), 0)
        seen.counts[slot] += 1
        if seen.counts[slot] > 1:
            chars += np.sum(lengths[first : first + _CODE_GRAM_WORDS])
            first += _CODE_GRAM_WORDS
        else:
            first += 1
    return chars
