"""What the filters' rules know of a word: its length and a few flags, packed in one number; and of every code point.

Nothing else of a word is kept but its hash. The flags of a word follow from those of its characters, so that compiled
loops read them from a table (`flags_of_points`, 0.5 MB, built in 60 ms); `facts_of` says the same of a whole word.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from raymill.corpus.chunks import code_points

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
POINTS = 0x40000
"""Beyond it there are neither letters nor marks, only private and unassigned code points."""


def facts_of(word: str) -> int:
    """All that is known of a word but its hash."""
    table = flags_of_points()
    flags = [int(table[ord(char)]) if ord(char) < POINTS else VISIBLE for char in word]
    some, every = 0, PUNCTUATION | ENDS_SENTENCE * (len(word) == 1)
    for each in flags:
        some |= each
        every &= each
    stop = STOP_WORDS.index(word) + 1 if word in STOP_WORDS else 0
    return len(word) << CHARS_SHIFT | stop << STOP_SHIFT | some & (VISIBLE | LETTER) | every


@cache
def flags_of_points() -> NDArray[np.uint16]:
    """Per code point the first four flags of a word of that character alone."""
    chars = [chr(point) for point in range(POINTS)]
    flags = np.full(POINTS, VISIBLE, np.uint16)
    flags[np.fromiter(map(str.isalpha, chars), bool, POINTS)] |= LETTER
    flags[np.fromiter((kind[0] == "P" for kind in map(unicodedata.category, chars)), bool, POINTS)] |= PUNCTUATION
    flags[sorted(SENTENCE_ENDS)] |= ENDS_SENTENCE
    flags[sorted(_INVISIBLE)] &= ~np.uint16(VISIBLE)
    return flags
