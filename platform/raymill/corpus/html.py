"""A web page to its main content: menus, banners, scripts and markup go, headings, paragraphs and lists stay.

Two extractors by choice. resiliparse (Bevendorff et al. 2018) reads 26 MB of page per second and core and keeps more:
97 % of the visible words of 250 pages of technical documentation. trafilatura (Barbaresi 2021), an extra to install,
reads 2 MB/s and keeps 71 %: it leaves less of the page around the text, and drops paragraphs it met before in the page.
A page no extractor can make sense of gives an empty text, never an error. Time grows with the size of the page and not
with its shape: finding the main content costs nodes times depth, so a page that is built to be deep is read as plain text.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raymill.corpus.limits import Extractor
from raymill.corpus.repair import join_surrogates
from raymill.errors import UsageError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_META_BYTES = 4096
"""A page says its charset in its first kilobyte by the standard; many say it a little later."""
_META = re.compile(rb"""<meta\b[^>]{0,400}?charset\s{0,9}=\s{0,9}["']?\s{0,9}([\w.:-]{1,40})""", re.IGNORECASE)
_STEPS_FREE, _STEPS_PER_BYTE = 2_000_000, 4
"""Nodes times depth that a page may have: 35 ns each. An ordinary page has 0.5 per byte."""
_FORMATTING = "a b big code em font i nobr s small strike strong tt u"
_NEVER_NESTED = "area base br col dd dt embed hr img input li link meta option p param source tbody td th tr track wbr"


def extract(page: bytes | str, extractor: Extractor) -> str:
    """The main content of one page, paragraphs parted by line ends.

    Raises UsageError when trafilatura is asked for and is not installed.
    """
    text = decode(page) if isinstance(page, bytes) else join_surrogates(page)
    return _extract_trafilatura(text) if extractor == "trafilatura" else _extract_resiliparse(text)


def decode(page: bytes) -> str:
    """The characters of a page: by byte order mark, else as UTF-8 if it is that, else as it says, else as it looks.

    A declared charset counts only for bytes that are no UTF-8 beyond ASCII: old declarations outlive a change to UTF-8,
    and no text of another charset is valid UTF-8 by chance.
    """
    for bom, charset in _BOMS:
        if page.startswith(bom):
            return page[len(bom) :].decode(charset, "replace")
    if not page.isascii():
        try:
            return page.decode()
        except UnicodeDecodeError:
            pass
    return page.decode(_declared_charset(page) or _likely_charset(page), "replace")


def _declared_charset(page: bytes) -> str | None:
    found = _META.search(page[:_META_BYTES])
    if found is None:
        return None
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = str(map_encoding_to_html5(found[1].decode("ascii", "replace"), fallback_utf8=False) or "")
    try:
        known = codecs.lookup(name)
    except LookupError:
        return None
    # A declaration that can be read as ASCII is not in UTF-16, whatever it says.
    return None if not known._is_text_encoding or name.startswith("utf-16") else name


def _likely_charset(page: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    name = str(detect_encoding(page[: 1 << 16], max_len=1 << 16))
    try:
        codecs.lookup(name)
    except LookupError:
        return "windows-1252"
    return name


def _extract_resiliparse(text: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLParserException

    data = np.frombuffer(text.encode(), np.uint8)
    shallow = _count_steps(data, _FORMATTING_HASHES, _NEVER_NESTED_HASHES) <= _STEPS_FREE + _STEPS_PER_BYTE * len(data)
    try:
        return str(extract_plain_text(text, main_content=bool(shallow)))
    except HTMLParserException:
        return ""


def _extract_trafilatura(text: str) -> str:
    extract_main = _load_trafilatura()
    try:
        return extract_main(text, include_comments=False) or ""
    except Exception:  # odd trees set off errors of many kinds in it and in lxml; none says more than: no content
        return ""


def _load_trafilatura() -> Callable[..., str | None]:
    try:
        from trafilatura import extract as extract_main
    except ImportError as error:
        what = "the extractor trafilatura is not installed"
        fix = 'pip install "raymill[trafilatura]", or use the extractor resiliparse'
        raise UsageError(what, why=str(error), fix=fix) from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every page it finds nothing in
    return extract_main


def _name_hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value * 31 + byte) % 2**32
    return value


_FORMATTING_HASHES = np.array([_name_hash(name) for name in _FORMATTING.split()], np.int64)
_NEVER_NESTED_HASHES = np.array([_name_hash(name) for name in _NEVER_NESTED.split()], np.int64)
_SCRIPT, _STYLE = _name_hash("script"), _name_hash("style")
_SVG, _MATH = _name_hash("svg"), _name_hash("math")
_WINDOW = 64


@njit(cache=True)
def _holds(hashes: NDArray[np.int64], value: Any) -> bool:
    for each in hashes:  # noqa: SIM110  numba compiles no generator here
        if each == value:
            return True
    return False


@njit(cache=True)
def _close(stack: NDArray[np.int64], depth: int, name: Any, formatting: NDArray[np.int64]) -> int:
    """The depth after an end tag; a formatting element goes alone, another takes what is open inside it along."""
    place = depth - 1
    while place >= 0 and place >= depth - _WINDOW and stack[place] != name:
        place -= 1
    if place < 0 or stack[place] != name:
        return depth
    alone = _holds(formatting, name)
    goal = place
    for at in range(place + 1, depth):
        if alone or _holds(formatting, stack[at]):
            stack[goal] = stack[at]
            goal += 1
    return goal


@njit(cache=True)
def _skip_to(data: NDArray[np.uint8], at: int, first: Any, second: Any) -> int:
    while at + 1 < len(data) and not (data[at] == first and data[at + 1] == second):
        at += 1
    return at


@njit(cache=True)
def _count_steps(data: NDArray[np.uint8], formatting: NDArray[np.int64], never_nested: NDArray[np.int64]) -> int:
    """The sum over all start tags of how many elements are open there; where tags are misnested, rather too much."""
    stack = np.empty(1024, np.int64)
    depth, steps, at, size, foreign = 0, 0, 0, len(data), False
    while at < size:
        if data[at] != 60 or at + 1 >= size:
            at += 1
            continue
        if at + 3 < size and data[at + 1] == 33 and data[at + 2] == 45 and data[at + 3] == 45:
            at = _skip_to(data, at + 2, 45, 62)  # <!-- to ->
            continue
        closing = data[at + 1] == 47
        at += 2 if closing else 1
        name, start = np.int64(0), at
        while at < size and (97 <= (data[at] | 32) <= 122 or (at > start and 48 <= data[at] <= 58)):
            name = (name * 31 + (data[at] | 32 if data[at] > 64 else data[at])) & 0xFFFFFFFF
            at += 1
        if at == start:
            continue
        if closing:
            depth = _close(stack, depth, name, formatting)
            continue
        steps += depth
        foreign = foreign or name in (_SVG, _MATH)
        if not foreign and name in (_SCRIPT, _STYLE):
            at = _skip_to(data, at, 60, 47)  # "</" inside a script only costs looking at what follows
            continue
        if foreign or not _holds(never_nested, name):
            if depth == len(stack):
                stack = np.concatenate((stack, stack))
            stack[depth] = name
            depth += 1
    return steps
