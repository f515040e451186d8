"""Documents that are full of obscenities and slurs, by a list of words and phrases.

A match is exact at the borders of words and blind to case: "class" holds no bad word. The rule follows C4 (Raffel et al.
2020), which drops a page for a single word of a list; `max_share` sets a milder one, as such a list also hits texts
about health, law and minorities. Costs 110 MB/s per core
for documents of 3 kB, whatever the length of the list.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from raymill.config import Config
from raymill.corpus.phrases import PhraseTable, build_table, count_hits, hash_words
from raymill.errors import DataError

BUILTIN = "builtin:en"


class BadWords(Config):
    """Which words are bad, and how many a document may have."""

    words: str = BUILTIN
    """A file with one word or phrase per line (UTF-8; lines that begin with # are notes), or `builtin:en`."""
    max_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a document's words, from 0 to 1, that may be bad; 0: a single one drops it."""


@dataclass(frozen=True)
class BadCount:
    """What a text holds."""

    bad: int
    """Words that are bad or belong to a bad phrase; one that belongs to two counts twice."""
    words: int

    def is_over(self, max_share: float) -> bool:
        """Whether more of the words are bad than may be."""
        return self.bad > max_share * self.words


def load_bad_words(words: str) -> PhraseTable:
    """The list of `BadWords.words`, once per process. Raises DataError when it cannot be read or holds no word."""
    return _load(words)


def count_bad(text: str, bad_words: PhraseTable) -> BadCount:
    """How many words of a text are in the list."""
    words = hash_words(text, join_at_marks=False)
    return BadCount(int(count_hits(words, bad_words) @ bad_words.lengths), len(words))


@cache
def _load(words: str) -> PhraseTable:
    path = Path(__file__).parent / "bad_words_en.txt" if words == BUILTIN else Path(words)
    fix = f"name a UTF-8 file with one word or phrase per line, or {BUILTIN}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the list of bad words cannot be read", where=str(path), why=str(error), fix=fix) from None
    phrases = []
    for line in lines:
        phrase = hash_words(unicodedata.normalize("NFC", line), join_at_marks=False)
        if len(phrase) and not line.startswith("#"):
            phrases.append((len(phrase), phrase))
    if not phrases:
        raise DataError("the list of bad words holds no word", where=str(path), fix=fix)
    return build_table(1, phrases)
