"""Copies of documents: swapped both ways with their case, noisy at the asked rate, and always the same."""

from __future__ import annotations

import hashlib

import pytest

from raymill.config import load
from raymill.corpus.augment import GENDER_EN, Augmentation, augment
from raymill.errors import ConfigError

SWAPS = Augmentation(swap_share=1.0, swap_list="gender_en")
NOISE = Augmentation(noise_share=1.0, noise_rate=0.05)


def swapped(text: str, options: Augmentation = SWAPS) -> str:
    ((suffix, copy),) = augment("a.txt", text, options)
    assert suffix == "~swap"
    return copy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He met the queen.", "She met the king."),
        ("HE SAID: SHE IS HIS SISTER", "SHE SAID: HE IS HER BROTHER"),
        ("Her book is new; give it to her.", "His book is new; give it to him."),
        ("We saw her in the garden.", "We saw him in the garden."),
        ("His car, not mine: it is his.", "Her car, not mine: it is hers."),
        ("The book is hers, I told him.", "The book is his, I told her."),
        ("Mr. Hale's father-in-law", "Ms. Hale's mother-in-law"),
    ],
)
def test_words_are_swapped_both_ways_in_the_case_they_had(text, expected):
    assert swapped(text) == expected


def test_only_whole_words_are_swapped_and_without_any_there_is_no_copy():
    assert augment("a.txt", "The theme of this shelter: manners, sheep, the_man_of.", SWAPS) == []


def test_own_pairs_are_used_both_ways():
    own = Augmentation(swap_share=1, swaps=(("Berlin", "Paris"),))
    assert swapped("From Berlin to PARIS.", own) == "From Paris to BERLIN."


def test_the_list_has_about_forty_pairs_that_come_back_when_swapped_twice():
    assert len(GENDER_EN) >= 40
    words = [word for pair in GENDER_EN for word in pair if word not in ("his", "her", "him", "hers")]
    text = " ".join(words)
    assert swapped(text) != text
    assert swapped(swapped(text)) == text


def test_nothing_is_made_unless_asked():
    assert augment("a.txt", "He said so.", Augmentation()) == []


def test_the_share_of_documents_is_the_one_asked_for_and_depends_on_the_id_alone():
    options = Augmentation(swap_share=0.3, swap_list="gender_en")
    chosen = [name for name in map(str, range(4000)) if augment(name, "he", options)]
    assert 0.27 < len(chosen) / 4000 < 0.33
    assert chosen == [name for name in map(str, range(4000)) if augment(name, "she", options)]


def test_noise_has_the_asked_rate_and_only_touches_letters():
    text = "the quick brown fox, 1234567890, jumps over the lazy dog. " * 200
    ((suffix, copy),) = augment("a.txt", text, NOISE)
    assert suffix == "~noise"
    assert [char for char in copy if not char.isalpha()] == [char for char in text if not char.isalpha()]
    letters = sum(char.isalpha() for char in text)
    upper = sum(char.isupper() for char in copy)  # a quarter of the slips, for the text has no capital
    assert 0.15 < upper / (0.05 * letters) < 0.35
    assert copy != text
    assert abs(len(copy) - len(text)) < 0.02 * letters


def test_noise_is_the_same_on_every_machine():
    (copy,) = augment("b.txt#7", "A river runs behind the old mill. " * 40, NOISE)
    assert copy == augment("b.txt#7", "A river runs behind the old mill. " * 40, NOISE)[0]
    assert copy != augment("b.txt#8", "A river runs behind the old mill. " * 40, NOISE)[0]
    assert hashlib.sha256(copy[1].encode()).hexdigest()[:16] == "60aa3a106cfccdd3"


@pytest.mark.parametrize(
    "text", ["", "\x00", "\ud800he", "\u0130 he", "\U0001f468\u200d\U0001f469 she", "\u00df\ufb01" * 99]
)
def test_hostile_text_crashes_nothing(text):
    both = Augmentation(swap_share=1, swap_list="gender_en", noise_share=1, noise_rate=0.5)
    assert augment("\ud800", text, both) == augment("\ud800", text, both)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["swap_share=0.5"], "swap_list"),
        (["swaps=[[a, a]]"], "itself"),
        (["swaps=[[a, b], [a, c], [a, d]]"], "three"),
        (["swaps=[['', b]]"], "letter"),
    ],
)
def test_pairs_that_cannot_be_swapped_are_refused_with_the_fix(overrides, word):
    with pytest.raises(ConfigError) as caught:
        load(Augmentation, None, overrides)
    assert word in str(caught.value)
