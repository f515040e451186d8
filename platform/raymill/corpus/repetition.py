"""Repeated phrases and the make-up of words: Gopher's rules (Rae et al. 2021, table A1 and appendix A1) in two loops.

In comes what `corpus.words` knows of a document's words, out the number of the first rule it breaks. The nine n-gram
rules cost about one: a phrase of n words can only stand twice where its parts of n - 1 words do, so each size looks only
at the places the one before left, in most texts a few per cent. About 240 MB/s per core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from raymill.corpus.measures import Hashes, find_or_add, mix, slot_mask
from raymill.corpus.word_facts import Facts

FREQUENT, REPEATED = 1, 2
TOO_LONG, WORD_LENGTH, SYMBOLS, FEW_LETTERS, FEW_STOP_WORDS = range(1, 6)
_TOP_LIMITS = (0.20, 0.18, 0.16)
"""Share of characters in the commonest phrase of 2, 3 and 4 words."""
_REPEATED_LIMITS = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
"""Share of characters in phrases of 5 to 10 words that stood before."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True)
def judge_phrases(hashes: Hashes, facts: Facts, chars: Any, seen: Any) -> Any:
    """FREQUENT, REPEATED or 0, of a document of so many characters. The table needs room for all words."""
    words = len(hashes)
    hash_sums, char_sums = np.empty(words + 1, np.uint64), np.empty(words + 1, np.int64)
    # From how many places on, one after the other, phrases of the last size stand more than once.
    runs = np.ones(words + 1, np.int32)
    hash_sums[0], char_sums[0], runs[words] = 0, 0, 0
    for place in range(words):
        hash_sums[place + 1] = hash_sums[place] * _BASE + hashes[place]
        char_sums[place + 1] = char_sums[place] + (facts[place] >> 16)
    power = _BASE
    for size in range(2, 5):
        power *= _BASE
        if words >= size:
            top = _top_chars(size, words, power, seen, hash_sums, char_sums, runs)
            if top / chars > _TOP_LIMITS[size - 2]:
                return FREQUENT
    run = 0
    for place in range(words - 1, -1, -1):
        run = run + 1 if runs[place] else 0
        runs[place] = run
    for size in range(5, 11):
        power *= _BASE
        repeated = _repeated_chars(size, words, power, seen, hash_sums, char_sums, runs)
        if repeated / chars > _REPEATED_LIMITS[size - 5]:
            return REPEATED
    return 0


@njit(cache=True)
def _top_chars(size: Any, words: Any, power: Any, seen: Any, hash_sums: Hashes, char_sums: Any, runs: Any) -> Any:
    """Characters in all of the commonest phrase, one between two words; of two as common, the first.

    Leaves in `runs` 1 where a phrase of this size stands more than once, else 0.
    """
    mask, keys, places, counts, base = slot_mask(words), seen.keys, seen.places, seen.counts, seen.base[0]
    best, best_count = 0, 1
    for place in range(words - size + 1):
        if runs[place] == 0 or runs[place + 1] == 0:
            runs[place] = 0
            continue
        key = mix(hash_sums[place + size] - hash_sums[place] * power)
        slot = (key >> np.uint64(7)) & mask
        while places[slot] >= base and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        runs[place] = 0
        if places[slot] < base:
            keys[slot], places[slot], counts[slot] = key, base + place, 1
        else:
            counts[slot] += 1
            count, first = counts[slot], places[slot] - base
            runs[place], runs[first] = 1, 1
            if count > best_count or (count == best_count and first < best):
                best, best_count = first, count
    for place in range(max(0, words - size + 1), words):
        runs[place] = 0
    seen.base[0] += words
    return (char_sums[best + size] - char_sums[best] + size - 1) * np.int64(best_count)


@njit(cache=True)
def _repeated_chars(size: Any, words: Any, power: Any, seen: Any, hash_sums: Hashes, char_sums: Any, runs: Any) -> Any:
    """Characters in phrases that stood before, none counted twice. `runs`: how many phrases of 4 words are candidates."""
    mask = slot_mask(words)
    chars, place = np.int64(0), 0
    while place <= words - size:
        if runs[place] < size - 3:
            place += 1
            continue
        key = mix(hash_sums[place + size] - hash_sums[place] * power)
        slot = find_or_add(seen, mask, key, place)
        seen.counts[slot] += 1
        if seen.counts[slot] > 1:
            chars += char_sums[place + size] - char_sums[place]
            place += size
        else:
            place += 1
    seen.base[0] += words + 1
    return chars


@njit(cache=True)
def is_short(facts: Facts, min_words: Any) -> bool:
    """Whether fewer words than that, punctuation not counted, or none at all. Stops counting at enough."""
    visible = 0
    for index in range(len(facts)):
        visible += facts[index] & 1
        if visible >= min_words and visible > 0:
            return False
    return True


@njit(cache=True)
def judge_words(facts: Facts, marks: Any, ellipses: Any, min_letter_share: Any, min_stop_words: int) -> Any:
    """The first of Gopher's other rules on words that a document breaks, or 0. `marks`: how many #."""
    visible, visible_chars, with_letter, stops = 0, np.int64(0), 0, 0
    for index in range(len(facts)):
        fact = facts[index]
        if fact & 1:
            visible += 1
            visible_chars += fact >> 16
        with_letter += (fact >> 1) & 1
        stops |= 1 << ((fact >> 8) & 15)
    words = len(facts)
    if visible > 100_000:
        return TOO_LONG
    if visible_chars / visible < 3 or visible_chars / visible > 10:
        return WORD_LENGTH
    if marks / words > 0.1 or ellipses / words > 0.1:
        return SYMBOLS
    if with_letter / words < min_letter_share:
        return FEW_LETTERS
    kinds = 0
    for stop in range(1, 9):
        kinds += (stops >> stop) & 1
    return FEW_STOP_WORDS if kinds < min_stop_words else 0
