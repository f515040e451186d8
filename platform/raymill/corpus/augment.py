"""Further copies of some documents: with words swapped for their counterparts, or with slips of typing. Off by default.

Counterfactual swaps (Lu et al. 2020, "Gender bias in neural natural language processing") put each word of a pair where
the other stood, whole words only and in the case they had: he and she, He and She, HE and SHE. Noise makes slips in
letters: two change places, one is dropped, doubled, or has the wrong case. Which documents, which letters and which
slip is decided by a hash of the document's id, so the same document always gives the same copies.
Costs per core for a document that is chosen: swaps 15 MB/s, noise 120 MB/s; for the others a hash of the id.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from raymill.config import Config

Pairs = tuple[tuple[str, str], ...]

_GENDER_EN = (
    "he/she his/her him/her his/hers himself/herself man/woman men/women boy/girl boys/girls father/mother"
    " fathers/mothers dad/mom dads/moms daddy/mommy son/daughter sons/daughters brother/sister brothers/sisters"
    " husband/wife husbands/wives uncle/aunt uncles/aunts nephew/niece nephews/nieces grandfather/grandmother"
    " grandpa/grandma grandson/granddaughter boyfriend/girlfriend groom/bride king/queen kings/queens"
    " prince/princess duke/duchess actor/actress actors/actresses waiter/waitress waiters/waitresses"
    " host/hostess hero/heroine gentleman/lady gentlemen/ladies male/female males/females mr/ms sir/madam"
    " widower/widow policeman/policewoman businessman/businesswoman"
)
GENDER_EN: Pairs = tuple((left, right) for left, _, right in (pair.partition("/") for pair in _GENDER_EN.split()))
"""English words of gender. his and her stand in two pairs, see `Augmentation.swaps`."""

_LISTS = {"gender_en": GENDER_EN}
_NO_NOUN = (
    "a an the to in on at by for from with of and or but that if when while as because before after than then into"
    " about again too so very not is was are were has had will would could should did does i you he she it we they"
    " this these there here up down out off away back over through during until since who what how why where"
)
"""A word of these after `her` shows that it meant him, not his."""
_NO_NOUNS = frozenset(_NO_NOUN.split())
_FOLLOWING = re.compile(r"[ \t\n]+([^\W\d_]+)")
_SLIPS = ("exchange", "drop", "double", "case")


class Augmentation(Config):
    """Further copies of documents, written beside the originals."""

    swap_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of documents that get a copy with words swapped, if they hold any such word; 0: off."""
    swap_list: Literal["gender_en"] | None = None
    """Pairs of words that come with raymill."""
    swaps: tuple[tuple[str, str], ...] = ()
    """Further pairs, each used both ways. A word in two pairs becomes the first before a noun, else the second: her as in
    (his, her), (him, her)."""
    noise_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of documents that get a copy with slips of typing; 0: off."""
    noise_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """Share of the letters of such a copy that a slip befalls."""

    @model_validator(mode="after")
    def _pairs_can_be_swapped(self) -> Augmentation:
        partners: dict[str, list[str]] = {}
        for left, right in self.pairs():
            for word, partner in ((left.lower(), right.lower()), (right.lower(), left.lower())):
                if not re.fullmatch(r"\w(?:.*\w)?", word):
                    raise ValueError(f"swaps: {word!r} is not a word; fix: begin and end it with a letter or digit")
                partners.setdefault(word, []).append(partner)
                if word == partner or len(set(partners[word])) != len(partners[word]) or len(partners[word]) > 2:
                    raise ValueError(
                        f"swaps: {word!r} is paired with itself, twice with a word, or with three; "
                        "fix: give a word one partner, or one before nouns and one elsewhere"
                    )
        if self.swap_share and not partners:
            raise ValueError("swap_share needs words to swap; fix: set swap_list: gender_en, or swaps")
        return self

    def pairs(self) -> Pairs:
        """The chosen list's pairs and then the job's own."""
        return (*(_LISTS[self.swap_list] if self.swap_list else ()), *self.swaps)


def augment(document_id: str, text: str, options: Augmentation) -> list[tuple[str, str]]:
    """The copies of one document: what to put behind its id, and the text. Copies equal to the original are none."""
    copies = []
    if options.swap_share and _draw("swap", document_id) < options.swap_share * 2**64:
        copies.append(("~swap", _swapped(text, options.pairs())))
    if options.noise_share and _draw("noise", document_id) < options.noise_share * 2**64:
        copies.append(("~noise", _noisy(text, options.noise_rate, _draw("slips", document_id))))
    return [(suffix, copy) for suffix, copy in copies if copy != text]


def _draw(purpose: str, document_id: str) -> int:
    """64 bits that depend on nothing else."""
    named = f"{purpose}\0{document_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _swap_table(pairs: Pairs) -> tuple[re.Pattern[str], dict[str, list[str]]]:
    partners: dict[str, list[str]] = {}
    for left, right in pairs:
        partners.setdefault(left.lower(), []).append(right.lower())
        partners.setdefault(right.lower(), []).append(left.lower())
    words = "|".join(re.escape(word) for word in sorted(partners, key=lambda word: (-len(word), word)))
    return re.compile(rf"\b(?:{words})\b"), partners


def _swapped(text: str, pairs: Pairs) -> str:
    pattern, partners = _swap_table(pairs)
    lowered = text.lower()
    if len(lowered) != len(text):  # some capitals have two small letters; those stay, so that places agree
        lowered = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)
    pieces, done = [], 0
    for match in pattern.finditer(lowered):
        start, end = match.span()
        choice = partners[match.group()]
        found = choice[0] if len(choice) == 1 or _noun_follows(text, end) else choice[1]
        pieces += [text[done:start], _in_case_of(text[start:end], found)]
        done = end
    return "".join(pieces) + text[done:]


def _in_case_of(word: str, partner: str) -> str:
    if word.isupper() and len(word) > 1:
        return partner.upper()
    return partner[0].upper() + partner[1:] if word[0].isupper() else partner


def _noun_follows(text: str, at: int) -> bool:
    following = _FOLLOWING.match(text, at)
    return following is not None and following.group(1).lower() not in _NO_NOUNS


def _noisy(text: str, rate: float, seed: int) -> str:
    """The raw stream of PCG64 is the same in every version of numpy, which its drawn distributions are not."""
    stream = np.random.PCG64(seed)
    hits = np.flatnonzero(stream.random_raw(len(text)) < np.uint64(int(rate * 2**64)))
    slips = stream.random_raw(len(hits)) >> np.uint64(62)
    pieces, done = [], 0
    for at, slip in zip(hits.tolist(), slips.tolist(), strict=True):
        letter = text[at]
        if at < done or not letter.isalpha():
            continue
        pieces.append(text[done:at])
        done = at + 1
        following = text[done : done + 1]
        if _SLIPS[slip] == "exchange" and following.isalpha() and following != letter:
            pieces.append(following + letter)
            done += 1
        elif _SLIPS[slip] == "case" and len(letter.swapcase()) == 1 and letter.swapcase() != letter:
            pieces.append(letter.swapcase())
        elif _SLIPS[slip] != "drop":
            pieces.append(letter * 2)
    return "".join(pieces) + text[done:]
