"""A table from chunks, or runs of words, to the hashes and facts of the words they are cut into; for compiled loops.

A key is a 64-bit hash and nothing of the text is kept: two different texts with one hash are not told apart (one in
10^10 for a table of 10^4). 20 ns for each look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.measures import FNV_PRIME, FNV_START, Bytes, Hashes, mix
from raymill.corpus.word_facts import Facts, facts_of


class Memory(NamedTuple):
    """An open hash table from a key to a stretch of two arrays of words."""

    keys: Hashes
    stretches: NDArray[np.int64]
    """First word << 32 | number of words."""
    hashes: Hashes
    facts: Facts
    used: NDArray[np.int64]
    """Keys and words in use."""


def new_memory(keys: int, words: int) -> Memory:
    """Room for that many of each; a table at most half full."""
    slots = 1 << (2 * keys - 1).bit_length()
    return Memory(
        np.zeros(slots, np.uint64),
        np.zeros(slots, np.int64),
        np.empty(words, np.uint64),
        np.empty(words, np.int64),
        np.zeros(2, np.int64),
    )


def learn_chunk(memory: Memory, chunk: str, words: Sequence[str]) -> None:
    data, hashes, facts = _array(chunk), _hashes(words), np.array([facts_of(word) for word in words], np.int64)
    remember(memory, np.uint64(hash_word(data, 0, len(data))), 0, len(words), hashes, facts)


def learn_run(memory: Memory, parts: Sequence[str], words: Sequence[str]) -> None:
    """Words that belong together, by the key of the words they were parted into."""
    key = np.uint64(run_key(_hashes(parts), 0, len(parts)))
    remember(memory, key, 0, len(words), _hashes(words), np.array([facts_of(word) for word in words], np.int64))


def _hashes(words: Sequence[str]) -> Hashes:
    return np.array([hash_text(word) for word in words], np.uint64)


def hash_text(text: str) -> int:
    """The hash that a word is kept by."""
    data = _array(text)
    return int(mix(np.uint64(hash_word(data, 0, len(data)))))


def _array(text: str) -> Bytes:
    return np.frombuffer(text.encode(), np.uint8)


@njit(cache=True)
def hash_word(text: Bytes, start: Any, end: Any) -> Any:
    """FNV-1a; of a word that is kept it is mixed once more."""
    value = FNV_START
    for at in range(start, end):
        value = (value ^ np.uint64(text[at])) * FNV_PRIME
    return value


@njit(cache=True)
def find(keys: Hashes, stretches: NDArray[np.int64], value: Any) -> Any:
    """The stretch of the key; 0: it is not known."""
    key = mix(value) | np.uint64(1)
    mask = np.uint64(len(keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while keys[slot] != 0:
        if keys[slot] == key:
            return stretches[slot]
        slot = (slot + np.uint64(1)) & mask
    return np.int64(0)


@njit(cache=True)
def copy(known: Hashes, known_facts: Facts, stretch: Any, words: Any, hashes: Hashes, facts: Facts) -> Any:
    """Appends the words of a stretch and gives the new number of words."""
    first = stretch >> 32
    for index in range(stretch & 0xFFFFFFFF):
        hashes[words] = known[first + index]
        facts[words] = known_facts[first + index]
        words += 1
    return words


@njit(cache=True)
def run_key(hashes: Hashes, first: Any, size: Any) -> Any:
    """The key of a run of words from their mixed hashes."""
    value = FNV_START
    for index in range(first, first + size):
        value = (value ^ hashes[index]) * FNV_PRIME
    return value


@njit(cache=True)
def remember(memory: Any, value: Any, first: Any, end: Any, hashes: Hashes, facts: Facts) -> None:
    """Adds the words from `first` to `end` by the hash of their chunk; forgets all others when there is no room.

    Runs of words that would fill a quarter of it are not kept.
    """
    keys, count = memory.keys, end - first
    if 2 * memory.used[0] >= len(keys) or memory.used[1] + count > len(memory.hashes):
        if 4 * count > len(memory.hashes):
            return
        keys[:] = 0
        memory.used[:] = 0
    key = mix(value) | np.uint64(1)
    mask = np.uint64(len(keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while keys[slot] != 0:
        slot = (slot + np.uint64(1)) & mask
    word = memory.used[1]
    keys[slot] = key
    memory.stretches[slot] = word << 32 | count
    for index in range(count):
        memory.hashes[word + index] = hashes[first + index]
        memory.facts[word + index] = facts[first + index]
    memory.used[0] += 1
    memory.used[1] += count
