"""Cuts one chunk (a run of anything but white space) into words as spaCy's blank English tokenizer does.

The field's filters count and compare the words of that tokenizer, so a rule can only decide as theirs where the words
are the same. What is cut: marks before and after a word, units and currency after a number, hyphens, commas, slashes
and full stops between letters, contractions ("can't" is "ca" and "n't"); web addresses, emoticons and abbreviations stay
whole. The words of a chunk do not depend on its neighbours: `corpus.words` remembers them.
Left out, with no effect on English: Arabic units; an emoticon whose marks white space parts is not looked at.
Costs about 17 us per chunk, linear in its length; the tables are built at the first call (0.1 s). What runs for nearly
every chunk is `corpus.cutting`, compiled loops of the same rules: a rule that changes here changes there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

_APOSTROPHE = "\u2019"
_QUOTES = (
    "'\"\u201d\u201c`\u2018\u00b4\u2019\u201a,\u201e\u00bb\u00ab\u300c\u300d\u300e\u300f\uff08\uff09\u3014\u3015\u3010\u3011"
    "\u300a\u300b\u3008\u3009\u2329\u232a\u27e6\u27e7"
)
_MARKS = (
    "\u2026,:;!?\u00bf\u061f\u00a1()[]{}<>_#*&\u3002\uff1f\uff01\uff0c\u3001\uff1b\uff1a\uff5e\u00b7\u0964\u060c\u06d4\u061b"
    "\u066a"
)
_CURRENCY_SIGNS = "24 A3 A5 E3F FDFC 20A0-20BF"
_HYPHENS = "-|\u2013|\u2014|--|---|\u2014\u2014|~"
_LENGTHS = "km m dm cm mm \u043a\u043c \u043c \u0434\u043c \u0441\u043c \u043c\u043c"
"""Units that may be squared or cubed."""
_UNITS = (
    "ha \u00b5m nm yd in ft kg g mg \u00b5g t lb oz m/s km/h kmh mph hPa Pa mbar mb MB kb KB gb GB tb TB T G M K % "
    "\u043d\u043c \u043a\u0433 \u0433 \u043c\u0433 \u043c/\u0441 \u043a\u043c/\u0447 \u043a\u041f\u0430 \u041f\u0430 "
    "\u043c\u0431\u0430\u0440 \u041a\u0431 \u041a\u0411 \u043a\u0431 \u041c\u0431 \u041c\u0411 \u043c\u0431 \u0413\u0431 "
    "\u0413\u0411 \u0433\u0431 \u0422\u0431 \u0422\u0411"
)

# Letters by code point, hexadecimal. Of the cased blocks, what Unicode calls upper or lower is so here.
_CASED = (
    "41-5A 61-7A C0-D6 D8-F6 F8-1BF 1C4-2AF 386 388-38A 38C 38E-38F 391-3A9 3AC-3AF 3B1-3C9 3CC-3CE 400-401 403-40A "
    "40C-40D 410-451 453-45A 45C-45D 490-491 496-497 4A2-4A3 4AE-4AF 4BA-4BB 4D8-4D9 4E8-4E9 1D00-1D25 1D6B-1D77 "
    "1D79-1D9A 1E00-1EFF 2C60-2C7B 2C7E-2C7F A722-A76F A771-A787 A78B-A78E A790-A7B9 A7FA AB30-AB5A AB60-AB64 "
    "FF21-FF3A FF41-FF5A"
)
_UNCASED = (
    "591-5F4 620-64A 66E-6D5 6E5-6FF 750-77F 8A0-8BD 900-9FF B80-CFF D80-DFF 1100-137F 2E80-2FDF 2FF0-30FF 31C0-31EF "
    "3200-4DBF 4E00-9FFF AC00-D7AF F900-FAFF FB1D-FBB1 FBD3-FD3D FD50-FDC7 FDF0-FDFB FE30-FE4F FE70-FEFC 1EE00-1EEBB "
    "1F200-1F2FF 20000-2A6DF 2A700-2EBEF 2F800-2FA1F"
)
_YOUNG_SYMBOLS = (
    "166D 2B97 2BC9 2BFF 2E50-2E51 32FF FD40-FD4F FDCF FDFE-FDFF 1019C 11FD5-11FF1 1CF50-1CFC3 1D1E9-1D1EA 1E14F "
    "1ED2E 1F10D-1F10F 1F16C-1F16F 1F1AD 1F6D5-1F6DF 1F6FA-1F6FF 1F774-1F77F 1F7D9-1F7FF 1F8B0-1F8FF 1F90C-1F90F "
    "1F93F 1F971-1F972 1F977-1F979 1F97B 1F9A3-1F9AF 1F9BA-1F9BF 1F9C3-1F9CF 1FA00-1FA5F 1FA6E-1FBFF"
)
"""Symbols younger than the tokenizer's table of them (Unicode 11)."""

_EMOTICONS = (
    ":) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( :-(( "
    ":((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 :() >:o "
    ":* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- "
    "-__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 (^_^) (-_-) (._.) "
    "(>_<) (*_*) (\u00ac_\u00ac) \u0ca0_\u0ca0 \u0ca0\ufe35\u0ca0 (\u0ca0_\u0ca0) \u00af\\(\u30c4)/\u00af "
    "(\u256f\u00b0\u25a1\u00b0\uff09\u256f\ufe35\u253b\u2501\u253b ><(((*>"
)
_CONTRACTIONS = (
    ("i", "'m 'm+a 'll 'll+'ve 'd 'd+'ve 've"),
    ("you we they", "'ll 'll+'ve 'd 'd+'ve 've 're"),
    ("he she it", "'ll 'll+'ve 'd 'd+'ve 's"),
    ("who what when where why how there", "'s 'll 'll+'ve 're 've 'd 'd+'ve"),
    ("that this", "'s 'll 'll+'ve 'd 'd+'ve"),
    ("these those", "'ll 'll+'ve 're 've 'd 'd+'ve"),
    ("ca could do does did had may might must need ought sha should wo would", "n't n't+'ve"),
    ("could might must should would not", "'ve"),
    ("ai are is was were have has dare", "n't"),
)
"""Words, small or with a capital, and what follows them, with its apostrophes or without any."""
_NO_CONTRACTIONS = frozenset(("ill", "its", "hell", "shell", "shed", "were", "well", "whore"))
_PARTED = "y'+all y+all how+'d+'y How+'d+'y can+not Can+not gon+na Gon+na got+ta Got+ta let+'s Let+'s c'm+on C'm+on"
_WHOLE = (
    "doin goin nothin nuthin ol somethin Doin Goin Nothin Nuthin Ol Somethin doin' goin' nothin' nuthin' ol' somethin' "
    "Doin' Goin' Nothin' Nuthin' Ol' Somethin' lovin' Lovin' lovin Lovin havin' Havin' havin Havin em 'em ll 'll nuff "
    "'nuff 'S 's \u2018S \u2018s 'd and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am "
    "o'clock O'clock Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. "
    "Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. "
    "Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. "
    "Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. \\t \\n "
    "\u2014 ' '' \\\") <space> C++ \u00e4. \u00f6. \u00fc."
)

_SYMBOLS_END = 0x20000
_MAY_BE_ADDRESS = re.compile(r"\.[^\W\dA-Z_]{2}|\.\d+\.\d+\.\d")
Words = tuple[str, ...]
_LONGEST_SUFFIX = 5


class Classes(NamedTuple):
    """Code points of the characters that the rules name."""

    letter: frozenset[int]
    lower: frozenset[int]
    upper: frozenset[int]
    symbol: frozenset[int]
    mark: frozenset[int]
    quote: frozenset[int]
    sign: frozenset[int]
    """Of a currency."""


class _Tables(NamedTuple):
    exceptions: dict[str, Words]
    """Chunks, or what is left of them without the marks around, whose words are fixed."""
    longest_exception: int
    prefix: re.Pattern[str]
    suffix: re.Pattern[str]
    infix: re.Pattern[str]
    host: re.Pattern[str]
    joined: dict[Words, Words]
    """Words that the marks part and that belong together, such as the two marks of a smile."""
    joined_heads: frozenset[Words]
    """The first two of each."""
    joined_sizes: tuple[int, ...]


def cut_chunk(chunk: str) -> list[str]:
    """The words of a chunk that holds no white space; joined they are the chunk."""
    exception = _tables().exceptions.get(chunk)
    return list(exception) if exception else _rejoin(_cut(chunk, _tables(), excepting=True))


def exceptions() -> dict[str, Words]:
    """Chunks of fixed words."""
    return _tables().exceptions


def joined() -> dict[Words, Words]:
    """Words that belong together after the marks have parted them."""
    return _tables().joined


@cache
def _tables() -> _Tables:
    known = _exceptions()
    patterns = _patterns()
    tables = _Tables(known, max(map(len, known)), *patterns, {}, frozenset(), ())
    for text, words in known.items():
        parts = tuple(_cut(text, tables, excepting=False))
        if len(parts) > 1:
            tables.joined[parts] = words
    sizes = sorted({len(parts) for parts in tables.joined}, reverse=True)
    return tables._replace(joined_sizes=tuple(sizes), joined_heads=frozenset(parts[:2] for parts in tables.joined))


def _cut(chunk: str, tables: _Tables, *, excepting: bool) -> list[str]:
    """Marks around it off, in turns from both ends, then what is left at the marks inside it."""
    before: list[str] = []
    after: list[str] = []
    start, end, fixed = 0, len(chunk), None
    while start < end:
        fixed = _exception(chunk, start, end, tables) if excepting else None
        if fixed:
            break
        prefix = _prefix_size(chunk, start, end, tables)
        if prefix:
            fixed = _exception(chunk, start + prefix, end, tables) if excepting else None
            if fixed:
                before.append(chunk[start : start + prefix])
                break
        suffix = _suffix_size(chunk, start + prefix, end, tables)
        if suffix:
            fixed = _exception(chunk, start, end - suffix, tables) if excepting else None
            if fixed:
                after.append(chunk[end - suffix : end])
                break
        if not prefix and not suffix:
            break
        if prefix:
            before.append(chunk[start : start + prefix])
        if suffix:
            after.append(chunk[end - suffix : end])
        start, end = start + prefix, end - suffix
    inner: list[str] | Words = fixed or _cut_inside(chunk[start:end], tables)
    return [*before, *inner, *reversed(after)]


def _exception(chunk: str, start: int, end: int, tables: _Tables) -> Words | None:
    return tables.exceptions.get(chunk[start:end]) if 0 < end - start <= tables.longest_exception else None


def _prefix_size(chunk: str, start: int, end: int, tables: _Tables) -> int:
    if chunk.startswith("..", start, end):
        return end - start - len(chunk[start:end].lstrip("."))
    match = tables.prefix.match(chunk, start, end)
    return match.end() - start if match else 0


def _suffix_size(chunk: str, start: int, end: int, tables: _Tables) -> int:
    """Looks at the last few characters only: the suffixes are short, but for dots, and chunks need not be."""
    if chunk.endswith("..", start, end):
        return end - start - len(chunk[start:end].rstrip("."))
    tail = chunk[max(start, end - _LONGEST_SUFFIX - 2) : end]
    match = tables.suffix.search(tail)
    return len(tail) - match.start() if match else 0


def _cut_inside(text: str, tables: _Tables) -> list[str]:
    if not text:
        return []
    if _is_address(text, tables):
        return [text]
    words, start = [], 0
    for match in tables.infix.finditer(text):
        if match.start() == 0:
            continue
        if match.start() > start:
            words.append(text[start : match.start()])
        words.append(match[0])
        start = match.end()
    if start < len(text):
        words.append(text[start:])
    return words


def _is_address(text: str, tables: _Tables) -> bool:
    """A host with a top-level domain or an IP number; before it a scheme or a user, after it a port or a path."""
    if not _MAY_BE_ADDRESS.search(text):
        return False
    scheme = re.match(r"[\w+.-]{2,}://", text)
    starts = {0, scheme.end() if scheme else 0, *(match.end() for match in re.finditer("(?<=.)@", text))}
    return any(tables.host.match(text, start) for start in starts)


def _rejoin(words: list[str]) -> list[str]:
    """Puts together what the marks parted; the longest run first, of runs as long the first."""
    tables = _tables()
    if tables.joined_heads.isdisjoint(pairwise(words)):
        return words
    taken: set[int] = set()
    runs: dict[int, tuple[int, Words]] = {}
    for size in tables.joined_sizes:
        for start in range(len(words) - size + 1):
            whole = tables.joined.get(tuple(words[start : start + size]))
            if whole:
                if start not in taken and start + size - 1 not in taken:
                    runs[start] = (size, whole)
                taken.update(range(start, start + size))
    if not runs:
        return words
    joined: list[str] = []
    at = 0
    while at < len(words):
        size, whole = runs.get(at, (1, (words[at],)))
        joined += whole
        at += size
    return joined


def code_points(ranges: str) -> Iterator[int]:
    """Code points from hexadecimal numbers and ranges of them."""
    for item in ranges.split():
        first, _, last = item.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


@cache
def classes() -> Classes:
    cased, uncased = list(code_points(_CASED)), frozenset(code_points(_UNCASED))
    by_case = {case: {point for point in cased if unicodedata.category(chr(point)) == case} for case in ("Ll", "Lu")}
    young = frozenset(code_points(_YOUNG_SYMBOLS))
    return Classes(
        uncased.union(cased),
        uncased | by_case["Ll"],
        uncased | by_case["Lu"],
        frozenset(p for p in range(_SYMBOLS_END) if unicodedata.category(chr(p)) == "So" and p not in young),
        frozenset(map(ord, _MARKS)),
        frozenset(map(ord, _QUOTES)),
        frozenset(code_points(_CURRENCY_SIGNS)),
    )


@cache
def units() -> tuple[str, ...]:
    """What may follow a number without a blank."""
    squared = (length + power for length in _LENGTHS.split() for power in ("", "\u00b2", "\u00b3"))
    return (*_UNITS.split(), *squared)


def _class(points: Iterable[int]) -> str:
    """The inside of a character class of a regular expression."""
    pairs: list[list[int]] = []
    for point in sorted(points):
        if pairs and pairs[-1][1] == point - 1:
            pairs[-1][1] = point
        else:
            pairs.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in pairs)


def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    letter, lower, upper, symbol, marks, quotes, signs = map(_class, classes())
    unit, sign = "|".join(map(re.escape, units())), f"[{signs}]"
    prefix = rf"[\u00a7%=\u2014\u2013{marks}{quotes}{signs}{symbol}]|\+(?![0-9])|(?:US|C|A)\$"
    suffix = (
        rf"(?:[{marks}{quotes}{symbol}\u2014\u2013]|\u2026\u2026|['\u2019][sS]"
        rf"|(?<=[0-9])(?:\+|{sign}|(?:US|C|A)\$|{unit})|(?<=\u00b0[FfCcKk])\."
        rf"|(?<=[0-9{lower}%\u00b2+|?:){marks}{quotes}-])\.|(?<=[{upper}][{upper}])\.)\Z"
    )
    infix = (
        rf"\.\.+|[\u2026{symbol}]|(?<=[0-9])[+*^-](?=[0-9-])|(?<=[{lower}{quotes}])\.(?=[{upper}{quotes}])"
        rf"|(?<=[{letter}]),(?=[{letter}])|(?<=[{letter}0-9])(?:{_HYPHENS})(?=[{letter}])"
        rf"|(?<=[{letter}0-9])[:<>=/](?=[{letter}])"
    )
    name = r"A-Za-z0-9\u00a1-\uffff"
    octets = r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
    local = r"(?!(?:10|127)(?:\.\d{1,3}){3}|(?:169\.254|192\.168)(?:\.\d{1,3}){2}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2})"
    host = rf"(?:{local}{octets}|(?:(?:[{name}][{name}_-]{{0,62}})?[{name}]\.)+[{lower}]{{2,63}})(?::\d{{2,5}})?(?:[/?#].*)?\Z"
    return re.compile(prefix), re.compile(suffix), re.compile(infix), re.compile(host, re.DOTALL)


def _exceptions() -> dict[str, Words]:
    known: dict[str, Words] = {}
    for subjects, endings in _CONTRACTIONS:
        for subject in subjects.split():
            for ending in endings.split():
                for word in (subject, subject.title()):
                    known |= {
                        "".join(words): words
                        for words in ((word, *ending.split("+")), (word, *ending.replace("'", "").split("+")))
                    }
    for word in _NO_CONTRACTIONS:
        known.pop(word, None)
        known.pop(word.title(), None)
    for item in _PARTED.split():
        known[item.replace("+", "")] = tuple(item.split("+"))
    for item in (*_WHOLE.split(), *_EMOTICONS.split(), *(f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyz")):
        known[item] = (item,)
    for hour in range(1, 13):
        known |= {f"{hour}{half}": (str(hour), half) for half in ("a.m.", "am", "p.m.", "pm")}
    known |= {f"\u00b0{scale}.": ("\u00b0", scale, ".") for scale in "cfkCFK"}
    curly = {text: words for text, words in known.items() if "'" in text}
    for text, words in curly.items():
        known[text.replace("'", _APOSTROPHE)] = tuple(word.replace("'", _APOSTROPHE) for word in words)
    return known
