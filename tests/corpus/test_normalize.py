"""One text, one spelling."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from raymill.corpus.normalize import Normalization, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffa\r\nb\rc\n", "a\nb\nc"),
        ("cafe\u0301", "caf\u00e9"),
        ("\n \n\t\n    indented\n  end  \n\n", "    indented\n  end"),
        ("  one line", "  one line"),
        (" \n\t ", ""),
        ("", ""),
        ("family: \U0001f468\u200d\U0001f469\u200d\U0001f467", "family: \U0001f468\u200d\U0001f469\u200d\U0001f467"),
    ],
    ids=["line ends and mark", "composed", "blank borders", "indent", "blank", "empty", "joined emoji"],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "The  Caf\u00e9\u200b, \x07don't", "The  Caf\u00e9\u200b, \x07don't"),
        ({"remove_special": True}, "a\x00b\x1b\tc\nd\x7f", "ab\tc\nd"),
        ({"remove_special": True}, "a\u200bb\u00ad\u202ec\ue000\u0085d\U000f0000", "abcd"),
        (
            {"remove_special": True},
            "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469",
            "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469",
        ),
        ({"lowercase": True}, "\u00c9T\u00c9 \u0130", "\u00e9t\u00e9 i\u0307"),
        ({"stop_words": "en"}, "The end of the road, don't you know: breathe", "end road, know: breathe"),
        ({"stop_words": "en"}, "It\u2019s IS Theory; off-the-shelf", "Theory; --shelf"),
        ({"stop_words": "de"}, "\u00dcber die Br\u00fccke", "Br\u00fccke"),
        ({"stop_words": ("road", "Caf\u00e9")}, "the caf\u00e9 ROAD roads", "the roads"),
        (
            {"strip_punctuation": True},
            "don't (a,b) end. 'q' \u201cx\u201d \u00bfno? $5+5",
            "dont  a b  end   q   x   no  $5+5",
        ),
        ({"strip_punctuation": True}, "it\u2019s\u3002\u3002ok", "its  ok"),
        ({"collapse_spaces": True}, " a \t\u00a0b  \n \n\n\n  c\nd", "a b\n\nc\nd"),
        (
            {"lowercase": True, "stop_words": "en", "strip_punctuation": True, "collapse_spaces": True},
            "The Road -- it's LONG, and the sea...\n\n\n\nEnd.",
            "road long sea\n\nend",
        ),
    ],
)
def test_options(options: dict[str, object], text: str, expected: str) -> None:
    assert normalize(text, Normalization(**options)) == expected


@pytest.mark.parametrize("field", Normalization.model_fields)
def test_nothing_is_on_unless_asked_for(field: str) -> None:
    assert not getattr(Normalization(), field)


def test_a_language_without_a_list_is_an_error() -> None:
    with pytest.raises(ValidationError, match="stop_words"):
        Normalization(stop_words="klingon")


@pytest.mark.parametrize("language", ["de", "en", "es", "fr", "it", "nl", "pt", "ru"])
def test_every_language_has_stop_words(language: str) -> None:
    words = {"de": "und", "en": "and", "es": "y", "fr": "et", "it": "e", "nl": "en", "pt": "e", "ru": "\u0438"}[
        language
    ]
    assert normalize(f"x {words} z", Normalization(stop_words=language)) == "x z"
