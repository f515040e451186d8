"""Where the sentences of a text begin and end, in characters, by rules and a lexicon of abbreviations; no model.

A mark (. ! ? ...) ends a sentence when white space and anything but a small letter follow it. The rest of this file is
exceptions to that: initials and abbreviations end one only before a word that opens sentences ("U.S. The", not
"U.S. Army"), titles never, numbers of lists and ordinals not, a quoted question not before "Mary asked". East Asian
marks need no space, and none inside corner brackets ends a sentence. A blank line always ends one, and so does the end
of a line that had room for the next word, because a hard-wrapped paragraph would have put it there: headings and list
items come out on their own. Two sentences with no space between them stay one.

Quality: F1 0.987 on the 157 hard boundaries that the tests label by hand in nine languages (0.981 before the rules saw
them); known to fail are a sentence that begins with iPhone and "Plan B. Nobody". Costs 80-100 MB/s of English with the
list of segments made; the text is laid out as code points, 4 bytes each.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Points = NDArray[np.uint32]
Tables = tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint64], NDArray[np.uint8]]
"""Kind of every character, its small letter, hashes of the lexicon's words in order, what each of them is."""

# Kinds of characters. Those from _LINE on stop the scan.
_OTHER, _SPACE, _SMALL, _CAPITAL, _LETTER, _DIGIT, _OPENING, _CLOSING, _QUOTE, _DASH = range(10)
_LINE, _STOP, _SHOUT, _ELLIPSIS, _WIDE, _SCRIPT, _CORNER, _CORNER_END = range(16, 24)
_MARKS = {
    _LINE: "\n\r\v\f\x85\u2028\u2029",
    _STOP: ".",
    _SHOUT: "!?\u203d\u2047\u2048\u2049",
    _ELLIPSIS: "\u2026",
    _WIDE: "\u3002\uff01\uff1f\uff61",  # East Asian
    _SCRIPT: "\u061f\u06d4\u0964\u0965\u0589\u1362\u1367\u17d4\u104b",  # Arabic, Urdu, Indic, Armenian, Ethiopic, ...
    _CORNER: "\u300c\u300e",
    _CORNER_END: "\u300d\u300f",
    _OPENING: "([{\u201c\u2018\u00ab\u2039\u00bf\u00a1\u201e\u201a\uff08\u3010\u300a",
    _CLOSING: ")]}\u201d\u2019\u00bb\u203a\uff09\u3011\u300b",
    _QUOTE: "\"'`*_",  # opens and closes; the last three are how markdown writes emphasis
    _DASH: "-\u2013\u2014\u2022",
}
_KINDS_OF_CATEGORY = {"Ll": _SMALL, "Lu": _CAPITAL, "Lt": _CAPITAL, "Lo": _LETTER, "Lm": _LETTER, "Nd": _DIGIT}

# What a word of the lexicon is. One word may be several.
_NEVER, _MAYBE, _NUMBERED, _OPENER, _SPEECH, _CALENDAR, _CLOCK = (1 << bit for bit in range(7))
_LEXICON = {
    # A name or a number follows: a stop after these never ends a sentence.
    _NEVER: "mr mrs ms mx dr dra prof rev fr gen col sgt capt cpt lt cmdr adm maj sen rep gov hon pres supt insp messrs"
    " mme mmes mlle sra srta sig sigg dott dhr mevr hr fig figs eq eqs vol vols pp vs cf viz e.g i.e z.b d.h bzw bspw"
    " vgl sog inkl ggf bijv p.ex \u0442.\u0435 \u0443\u043b \u0438\u043c \u0441\u043c",
    # Ends a sentence only before a word that opens sentences.
    _MAYBE: "inc ltd co corp llc plc bros jr sr st ave blvd rd mt ft dept univ assn est approx ca al etc ed eds trans"
    " jan feb mar apr jun jul aug sep sept oct nov dec tues thurs calif ariz conn fla colo mich minn okla"
    " min max hrs lbs oz usw u.a evtl str tel jh geb gest av ud uds ecc enz ph.d m.d b.a m.a"
    " \u0442.\u0434 \u0442.\u043f \u0434\u0440 \u0440\u0443\u0431 \u0442\u044b\u0441 \u043c\u043b\u043d",
    _NUMBERED: "no nos nr sec sect ch chap art para p v ver abb tab",
    _OPENER: "the this that these those it he she they we you i a an but and or so yet in on at by for from with to of"
    " if when while as after before although though because since until however there here his her its my our your"
    " their what who why how where which then thus hence also no not yes some many most one all each every another"
    " others several both such is are was were do does did can could would should will now today later once only"
    " perhaps maybe meanwhile moreover furthermore instead"
    " der die das ein eine er sie es wir ich und aber im am auf mit nach"
    " le la les un une il elle ils nous vous mais et dans el los las una en pero y",
    _SPEECH: "said says asked asks replied cried shouted whispered answered exclaimed called screamed demanded yelled"
    " muttered murmured added wondered",
    _CALENDAR: "january february march april may june july august september october november december"
    " monday tuesday wednesday thursday friday saturday sunday eastern pacific central mountain"
    " januar februar m\u00e4rz mai juni juli oktober dezember jahrhundert",
    _CLOCK: "a.m p.m",
}
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_QUOTES = (34, 39, 0x201C, 0x201D, 0x2019, 0xBB)
_LONGEST_TOKEN_CHARS = 24
_LONGEST_QUOTE_CHARS = 400
_NARROWEST_WRAP_CHARS = 40
_NOT_IN_TABLE = 0xFFFF


def find_sentences(text: str) -> NDArray[np.int64]:
    """Start and end of every sentence, one row each; nothing but white space lies outside them."""
    points = np.frombuffer(text.encode(f"utf-32-{sys.byteorder[0]}e", "surrogatepass"), np.uint32)
    return np.asarray(_find(points, *_tables()))


@lru_cache(maxsize=1)
def _tables() -> Tables:
    """Built on first use in 30 ms."""
    kinds = np.zeros(_NOT_IN_TABLE + 1, np.uint8)
    small = np.arange(_NOT_IN_TABLE + 1, dtype=np.uint16)
    for point in range(_NOT_IN_TABLE):
        char = chr(point)
        kinds[point] = _SPACE if char.isspace() else _KINDS_OF_CATEGORY.get(unicodedata.category(char), _OTHER)
        if kinds[point] == _CAPITAL and len(char.lower()) == 1:
            small[point] = ord(char.lower())
    for kind, chars in _MARKS.items():
        for char in chars:
            kinds[ord(char)] = kind
    flags: dict[int, int] = {}
    for flag, words in _LEXICON.items():
        for word in words.split():
            key = _hash(word)
            flags[key] = flags.get(key, 0) | flag
    hashes = sorted(flags)
    return kinds, small, np.array(hashes, np.uint64), np.array([flags[key] for key in hashes], np.uint8)


def _hash(word: str) -> int:
    value = int(_FNV_START)
    for char in word:
        value = (value ^ ord(char)) * int(_FNV_PRIME) % 2**64
    return value


@njit(cache=True)
def _kind(points: Points, at: int, kinds: Any) -> int:
    return kinds[min(points[at], np.uint32(_NOT_IN_TABLE))]


@njit(cache=True)
def _is_word(kind: int) -> bool:
    return _SMALL <= kind <= _DIGIT


@njit(cache=True)
def _look_up(points: Points, start: int, end: int, small: Any, hashes: Any, flags: Any) -> int:
    """What the lexicon has of a word, 0 if nothing."""
    value = _FNV_START
    for at in range(start, end):
        point = points[at]
        if point < _NOT_IN_TABLE:
            point = np.uint32(small[point])
        value = (value ^ np.uint64(point)) * _FNV_PRIME
    place = np.searchsorted(hashes, value)
    if place < len(hashes) and hashes[place] == value:
        return flags[place]
    return 0


@njit(cache=True)
def _word_end(points: Points, start: int, kinds: Any) -> int:
    at = start
    while at < len(points) and at - start <= _LONGEST_TOKEN_CHARS and _is_word(_kind(points, at, kinds)):
        at += 1
    return at


@njit(cache=True)
def _skip_space(points: Points, at: int, kinds: Any) -> tuple[int, int]:
    """The next place that is not white space, and how many ends of lines lie before it."""
    lines = 0
    while at < len(points):
        kind = _kind(points, at, kinds)
        if kind == _LINE:
            lines += not (points[at] == 10 and points[at - 1] == 13 and at > 0)
        elif kind != _SPACE:
            break
        at += 1
    return at, lines


@njit(cache=True)
def _skip_closing(points: Points, at: int, kinds: Any) -> int:
    """Behind the quotes, brackets and [12] references that belong to the mark before `at`."""
    size = len(points)
    while at < size:
        kind = _kind(points, at, kinds)
        if kind in (_CLOSING, _QUOTE, _CORNER_END) or points[at] == 0x201C:  # the last closes in German
            at += 1
        elif kind == _SPACE and at + 1 < size and points[at + 1] == 0xBB:  # French puts a space before this quote
            at += 2
        elif points[at] == 91:
            end = at + 1
            while end < size and _kind(points, end, kinds) == _DIGIT:
                end += 1
            if end == at + 1 or end == size or points[end] != 93:
                break
            at = end + 1
        else:
            break
    return at


@njit(cache=True)
def _next_word(points: Points, at: int, kinds: Any) -> int:
    """Behind the quotes, brackets and dashes that may stand before a sentence's first word."""
    while at < len(points):
        kind = _kind(points, at, kinds)
        if kind not in (_OPENING, _QUOTE, _DASH, _SPACE, _CORNER):
            break
        at += 1
    return at


@njit(cache=True)
def _is_enumerator(points: Points, start: int, end: int, kinds: Any) -> bool:
    """Whether this stands before a dot as the number of a list item: 12, b, iv."""
    digits, romans = 0, 0
    for at in range(start, end):
        digits += _kind(points, at, kinds) == _DIGIT
        romans += (points[at] | 32) in (105, 118, 120, 108)
    length = end - start
    return (length <= 3 and digits == length) or (length <= 4 and romans == length) or (length == 1 and digits == 0)


@njit(cache=True)
def _is_dotted(points: Points, start: int, end: int, kinds: Any) -> bool:
    """Whether a token is letters between dots, as in U.S or Ph.D."""
    run, dots = 0, 0
    for at in range(start, end):
        kind = _kind(points, at, kinds)
        if kind == _STOP:
            dots += 1
            run = 0
        elif kind in (_SMALL, _CAPITAL, _LETTER):
            run += 1
        else:
            return False
        if run > 2:
            return False
    return dots > 0


@njit(cache=True)
def _stop_ends(points: Points, dot: int, sentence: int, word: int, tables: Any) -> bool:
    """Whether a single dot, white space and no small letter behind it, ends the sentence. word: the next one's start."""
    kinds, small, hashes, flags = tables
    start = dot
    while start > sentence and dot - start < _LONGEST_TOKEN_CHARS:
        kind = _kind(points, start - 1, kinds)
        if not (_is_word(kind) or kind == _STOP):
            break
        start -= 1
    while start < dot and points[start] == 46:
        start += 1
    if start == dot:
        return True
    before = start - 1
    while before >= sentence and _kind(points, before, kinds) == _SPACE:
        before -= 1
    at_line_start = before < sentence or _kind(points, before, kinds) == _LINE
    if at_line_start and _is_enumerator(points, start, dot, kinds):
        return False
    what = _look_up(points, start, dot, small, hashes, flags)
    end = _word_end(points, word, kinds)
    following = _look_up(points, word, end, small, hashes, flags) if end > word else 0
    number_follows = end > word and _kind(points, word, kinds) == _DIGIT
    if what & _NEVER or (what & _NUMBERED and number_follows):
        return False
    if what & _CLOCK:
        shouted = end - word >= 2 and _kind(points, word + 1, kinds) == _CAPITAL  # a.m. EST
        return not (shouted or following & _CALENDAR)
    length = dot - start
    if length <= 2 and _kind(points, start, kinds) == _DIGIT and following & _CALENDAR:
        return False
    initial = length == 1 and _SMALL <= _kind(points, start, kinds) <= _LETTER
    if what & _MAYBE or initial or _is_dotted(points, start, dot, kinds):
        dotted_next = end < len(points) and points[end] == 46
        return following & _OPENER != 0 and not dotted_next
    return True


@njit(cache=True)
def _mark_ends(points: Points, mark: int, close: int, after: int, sentence: int, tables: Any) -> bool:
    """Whether the run of marks that begins at `mark` ends the sentence. close: behind its quotes; after: what follows."""
    kinds, small, hashes, flags = tables
    end, wide, script, shout, dots = mark, False, False, False, 0
    while end < close:
        kind = _kind(points, end, kinds)
        if not _STOP <= kind <= _SCRIPT:
            break
        wide, script, shout = wide or kind == _WIDE, script or kind == _SCRIPT, shout or kind == _SHOUT
        dots += 2 if kind == _ELLIPSIS else kind == _STOP
        end += 1
    if wide:  # to, tte, ha, ga, ni, wo, no, de, mo: what was quoted goes on as part of a Japanese sentence
        goes_on = points[after] in (0x3068, 0x3063, 0x306F, 0x304C, 0x306B, 0x3092, 0x306E, 0x3067, 0x3082, 0x3001)
        return not (goes_on and close > end)
    if after == close or script:
        return after > close
    word = _next_word(points, after, kinds)
    if word == len(points):
        return True
    first = _kind(points, word, kinds)
    if first == _SMALL:
        return False
    if shout:
        if close == end:
            return True
        second, _ = _skip_space(points, _word_end(points, word, kinds), kinds)
        spoken = _look_up(points, second, _word_end(points, second, kinds), small, hashes, flags)
        return not spoken & _SPEECH
    if dots > 1:  # "Well... I" says nothing of where the sentence ends, for I is always large
        return not (points[word] == 73 and _word_end(points, word, kinds) == word + 1)
    closes_quote = close > end and points[end] in _QUOTES and first == _CAPITAL
    return closes_quote or _stop_ends(points, mark, sentence, word, tables)


@njit(cache=True)
def _line_ends(points: Points, at: int, line: int, width: int, after: int, tables: Any) -> bool:
    """Whether the end of a line at `at`, no mark before it, ends the sentence. width: of the line above."""
    kinds = tables[0]
    size = len(points)
    bullet = _kind(points, after, kinds) == _DASH or points[after] == 42
    number = _word_end(points, after, kinds)
    if not bullet and number < size and points[number] in (41, 46) and number > after:
        bullet = _is_enumerator(points, after, number, kinds)
        after_bullet = number + 1
    else:
        after_bullet = after + 1
    if bullet and after_bullet < size and _kind(points, after_bullet, kinds) == _SPACE:
        return True
    if _kind(points, after, kinds) == _SMALL:
        return False
    last = at - 1
    while last > line and _kind(points, last, kinds) == _SPACE:
        last -= 1
    if points[last] in (44, 59, 45, 0x2013, 0x2014, 0x3001, 0xFF0C):
        return False
    end, word_chars = after, -1
    while end < size and end - after < 4 * _NARROWEST_WRAP_CHARS and _kind(points, end, kinds) != _LINE:
        if word_chars < 0 and _kind(points, end, kinds) == _SPACE:
            word_chars = end - after
        end += 1
    if word_chars < 0:
        word_chars = end - after
    return last - line + 2 + word_chars <= max(_NARROWEST_WRAP_CHARS, width, end - after)


@njit(cache=True)
def _find(points: Points, kinds: Any, small: Any, hashes: Any, flags: Any) -> NDArray[np.int64]:
    tables = (kinds, small, hashes, flags)
    size = len(points)
    found, count = np.empty((64, 2), np.int64), 0
    start, _ = _skip_space(points, 0, kinds)
    at, corner, line, width = start, -1, start, 0
    while at < size:
        kind = _kind(points, at, kinds)
        if kind < _LINE:
            at += 1
            continue
        end, after = at, at + 1
        ends = False
        if kind == _LINE:
            after, lines = _skip_space(points, at, kinds)
            if after < size and at > start:
                ends = lines > 1 or _line_ends(points, at, line, width, after, tables)
            width, line, corner = at - line, after, -1
            while end > start and _kind(points, end - 1, kinds) == _SPACE:
                end -= 1
        elif kind == _CORNER:
            corner = at
        elif kind == _CORNER_END:
            corner = -1
        else:
            while end < size and _STOP <= _kind(points, end, kinds) <= _SCRIPT:
                end += 1
            close = _skip_closing(points, end, kinds)
            following, lines = _skip_space(points, close, kinds)
            if close > end and _kind(points, close - 1, kinds) == _CORNER_END:
                corner = -1
            quoted = kind == _WIDE and corner >= 0 and at - corner < _LONGEST_QUOTE_CHARS
            if following < size and not quoted:
                ends = lines > 1 or _mark_ends(points, at, close, following, start, tables)
            end = close
            after = following if ends else close
            if ends and lines:
                width, line, corner = close - line, following, -1
        if ends:
            if count == len(found):
                longer = np.empty((2 * count, 2), np.int64)
                longer[:count] = found
                found = longer
            found[count, 0], found[count, 1] = start, end
            count += 1
            start = after
        at = max(after, at + 1)
    end = size
    while end > start and _kind(points, end - 1, kinds) in (_SPACE, _LINE):
        end -= 1
    if end > start:
        last = np.array([[start, end]], np.int64)
        return np.concatenate((found[:count], last))
    return found[:count].copy()
