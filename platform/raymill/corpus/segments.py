"""Cut a document into segments: sentences, paragraphs, pieces of a fixed length, or a sliding window.

A segment is where it stands in the document's text, in characters, and the text there. Sentences are found by
`corpus.sentences`; paragraphs are parted by blank lines. Lengths and windows are exact: every segment but the last has
`size_chars` characters, or up to a few less where the cut would fall inside what a reader sees as one character (a
letter and its accents, an emoji of several parts, a Hangul syllable, the two halves of a flag or of a line's end).
Costs per core: sentences 80-100 MB/s of English, windows of 128 characters 70, paragraphs and large sizes over 500.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from raymill.config import Config

Span = tuple[int, int]

_BLANK_LINES = re.compile(r"\n\s*\n")
_JOINER = "\u200d"


class Segment(NamedTuple):
    """A piece of a document: `document.text[start_char:end_char] == text`."""

    start_char: int
    end_char: int
    text: str


class Segmentation(Config):
    """How documents are cut into smaller ones."""

    method: Literal["sentence", "paragraph", "length", "window"] = "paragraph"
    """What a segment is: sentences, paragraphs (parted by blank lines), a fixed length, or a window that slides."""
    per_segment: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Methods sentence and paragraph: how many of them make one segment."""
    size_chars: Annotated[int, Field(ge=1, le=1 << 30)] = 2000
    """Methods length and window: size of a segment, characters."""
    overlap_chars: Annotated[int, Field(ge=0)] = 0
    """Method window: how much of a segment stands in the next one too, characters."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """A segment with fewer characters is left out."""

    @model_validator(mode="after")
    def _fits(self) -> Segmentation:
        if self.method == "window" and not 0 < self.overlap_chars < self.size_chars:
            raise ValueError(
                f"a window of {self.size_chars} characters cannot overlap by {self.overlap_chars}; "
                "fix: set overlap_chars between 1 and size_chars - 1, or method: length for none"
            )
        if self.method != "window" and self.overlap_chars:
            raise ValueError(f"method {self.method} has no overlap; fix: set method: window or overlap_chars: 0")
        if self.method in ("length", "window") and self.min_chars > self.size_chars:
            raise ValueError(
                f"min_chars {self.min_chars} is over size_chars {self.size_chars}, nothing would be left; "
                "fix: lower min_chars"
            )
        return self


def segment(text: str, options: Segmentation) -> list[Segment]:
    """The segments of a text in order. Sentences and paragraphs leave out the white space between them."""
    spans: Iterable[Span]
    if options.method == "sentence":
        spans = _grouped(_sentences(text), options.per_segment)
    elif options.method == "paragraph":
        spans = _grouped(_paragraphs(text), options.per_segment)
    else:
        spans = _windows(text, options.size_chars, options.overlap_chars)
    floor = options.min_chars
    return [Segment(start, end, text[start:end]) for start, end in spans if end - start >= floor]


def _sentences(text: str) -> list[Span]:
    from raymill.corpus.sentences import find_sentences

    starts, ends = find_sentences(text).T.tolist()
    return list(zip(starts, ends, strict=True))


def _paragraphs(text: str) -> list[Span]:
    breaks = [match.span() for match in _BLANK_LINES.finditer(text)]
    starts = [0, *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text)]
    trimmed = (_trim(text, start, end) for start, end in zip(starts, ends, strict=True))
    return [(start, end) for start, end in trimmed if start < end]


def _trim(text: str, start: int, end: int) -> Span:
    """The span without white space at its ends; a line's indent at the start stays, it is part of code and verse."""
    piece = text[start:end]
    end -= len(piece) - len(piece.rstrip())
    first = len(piece) - len(piece.lstrip())
    return start + (piece.rfind("\n", 0, first) + 1), end


def _grouped(spans: list[Span], size: int) -> list[Span]:
    if size == 1:
        return spans
    groups = (spans[at : at + size] for at in range(0, len(spans), size))
    return [(group[0][0], group[-1][1]) for group in groups]


def _windows(text: str, size: int, overlap: int) -> Iterator[Span]:
    start = 0
    while start < len(text):
        end = _cut_before(text, start + size, start)
        yield start, end
        if end == len(text):
            return
        start = max(_cut_before(text, end - overlap, start), start + 1) if overlap else end


def _cut_before(text: str, cut: int, start: int) -> int:
    """The last place in (start, cut] where no character as seen by a reader is cut; `cut` itself if there is none."""
    if cut >= len(text):
        return len(text)
    place = cut
    while place > start and _joined(text, place):
        place -= 1
    return place if place > start else cut


def _joined(text: str, place: int) -> bool:
    """Whether the characters before and at `place` are seen as one, by the main rules of Unicode's annex 29."""
    after = text[place]
    if after < "\u0300":
        return after == "\n" and text[place - 1] == "\r"
    if text[place - 1] == _JOINER or after == _JOINER or unicodedata.category(after)[0] == "M":
        return True
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\u1160" <= after <= "\u11ff":  # skin tones; vowels of Hangul
        return True
    flags = 0
    while _is_flag_half(after) and place > flags and _is_flag_half(text[place - 1 - flags]):
        flags += 1
    return flags % 2 == 1


def _is_flag_half(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"
