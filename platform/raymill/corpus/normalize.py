"""One text, one spelling: so that the same document from two editors has the same bytes and the same hash.

The byte order mark goes, line ends become LF, characters are composed (NFC), blank lines before and white space after
the text go. Nothing inside it is touched, but by choice: what `Normalization` switches on.
Costs about 700 MB/s in documents of 3 kB that are already normal; the switches cost more: lower case runs at 150 MB/s,
spaces at 70, special characters at 60, stop words at 18, punctuation at 15.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

from raymill.config import Config

StopLanguage = Literal["de", "en", "es", "fr", "it", "nl", "pt", "ru"]


class Normalization(Config):
    """Changes inside the text. All are off: each takes something away that a language model should know."""

    remove_special: bool = False
    """Whether control, zero-width, bidirectional and private-use characters go (joiners stay: they spell words)."""
    lowercase: bool = False
    """Whether letters become lower case."""
    stop_words: StopLanguage | tuple[str, ...] | None = None
    """Words that go: the commonest words of a language (`en`), or a list of words; null for none."""
    strip_punctuation: bool = False
    """Whether punctuation becomes a space, and the apostrophe inside a word nothing."""
    collapse_spaces: bool = False
    """Whether white space becomes one space, one line end or one blank line."""


def normalize(text: str, options: Normalization | None = None) -> str:
    """The text in its one spelling; with options, changed inside as well, in the order of their fields."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if options is not None:
        text = _change(text, options)
    text = text.rstrip()
    first_line_end = text.rfind("\n", 0, len(text) - len(text.lstrip()))
    return text[first_line_end + 1 :]


def _change(text: str, options: Normalization) -> str:
    if options.remove_special:
        text = _remove_special(text)
    if options.lowercase:
        text = unicodedata.normalize("NFC", text.lower())
    if options.stop_words:
        text = _remove_words(text, _stop_words(options.stop_words))
    if options.strip_punctuation:
        text = _APOSTROPHE.sub("", text)
        text = text.translate(_ASCII_MARKS) if text.isascii() else _marks().sub(" ", text)
    if options.collapse_spaces:
        text = "\n".join([" ".join(line.split()) for line in text.split("\n")])
        if "\n\n\n" in text:
            text = _BLANK_LINES.sub("\n\n", text)
    return text


_APOSTROPHE = re.compile(r"['\u2019](?<=\w.)(?=\w)")
_WORD = re.compile(r"(\w+(?:['\u2019]\w+)* ?)")
_BLANK_LINES = re.compile(r"\n{3,}")
_ASCII_CONTROLS = bytes({*range(32), 127} - {*b"\t\n"})
_ASCII_MARKS = {point: " " for point in range(128) if unicodedata.category(chr(point))[0] == "P"}


def _remove_special(text: str) -> str:
    if text.isascii():
        return text.encode().translate(None, _ASCII_CONTROLS).decode()
    return _special().sub("", text)


def _remove_words(text: str, words: frozenset[str]) -> str:
    """Without these words and the space behind each."""
    parts = _WORD.split(text)
    parts[1::2] = ["" if part.lower().replace("\u2019", "'") in words else part for part in parts[1::2]]
    return "".join(parts)


@cache
def _special() -> re.Pattern[str]:
    joiners = "\u200c\u200d"
    zero_width = {"\u00ad", "\u034f", "\u061c", "\u180e", "\u115f", "\u1160", "\u3164"}
    tags = range(0xE0000, 0xE0080)  # they spell flags of regions
    return _one_of(
        point
        for point in range(sys.maxunicode + 1)
        if (unicodedata.category(chr(point)) in ("Cc", "Cf", "Co") or chr(point) in zero_width)
        and chr(point) not in joiners + "\t\n"
        and point not in tags
    )


@cache
def _marks() -> re.Pattern[str]:
    return _one_of(point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point))[0] == "P")


def _one_of(points: Iterable[int]) -> re.Pattern[str]:
    """Matches one of these characters."""
    ranges: list[list[int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]")


@cache
def _stop_words(words: StopLanguage | tuple[str, ...]) -> frozenset[str]:
    """In lower case, each also with a space behind it."""
    if isinstance(words, str):
        words = tuple(json.loads((Path(__file__).parent / "stop_words.json").read_text())[words])
    lowered = [unicodedata.normalize("NFC", word.lower().replace("\u2019", "'")) for word in words]
    return frozenset([*lowered, *(f"{word} " for word in lowered)])
