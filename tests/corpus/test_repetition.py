"""Gopher's n-gram rules against a plain reading of them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from raymill.corpus.measures import mix, new_seen
from raymill.corpus.repetition import FREQUENT, REPEATED, judge_phrases
from raymill.corpus.word_facts import CHARS_SHIFT


def plain_judge(words: list[str], chars: float) -> int:
    for size, limit in ((2, 0.2), (3, 0.18), (4, 0.16)):
        phrases = [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]
        if phrases:
            phrase, count = Counter(phrases).most_common(1)[0]
            if len(phrase) * count / chars > limit:
                return FREQUENT
    for size, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        seen, again, start = set(), 0, 0
        while start <= len(words) - size:
            phrase = " ".join(words[start : start + size])
            if phrase in seen:
                again += len(phrase) - size + 1
                start += size
            else:
                seen.add(phrase)
                start += 1
        if again / chars > limit:
            return REPEATED
    return 0


def test_phrases_are_counted_as_the_paper_says() -> None:
    """Lengths of texts are drawn too, so that shares come close to the limits from both sides."""
    draw = random.Random(11)
    seen = new_seen(1 << 10)
    found: Counter[int] = Counter()
    for _ in range(3000):
        vocabulary = ["w" * draw.randint(1, 9) + str(number) for number in range(draw.choice([3, 8, 30, 100]))]
        words = [draw.choice(vocabulary) for _ in range(draw.randint(0, 60))]
        for _ in range(draw.randint(0, 3)):
            start = draw.randint(0, len(words))
            words += words[start : start + draw.randint(1, 14)]
        chars = max(1, round(len(" ".join(words)) * draw.choice([1, 1.5, 2, 4])))
        hashes = np.array([mix(np.uint64(vocabulary.index(word) + 1)) for word in words], np.uint64)
        facts = np.array([len(word) << CHARS_SHIFT for word in words], np.int64)
        code = judge_phrases(hashes, facts, chars, seen)
        assert code == plain_judge(words, chars), (words, chars)
        found[code] += 1
    assert all(found[code] > 100 for code in (0, FREQUENT, REPEATED)), found
