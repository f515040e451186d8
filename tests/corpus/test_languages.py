"""Languages against py3langid itself, on sound text and on noise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from pydantic import ValidationError

from raymill.corpus.languages import CODES, LOOKED_AT_CHARS, Languages, identify

SENTENCES: dict[str, list[str]] = json.loads((Path(__file__).parent / "sentences.json").read_text())


@pytest.fixture(scope="module")
def theirs() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def texts() -> list[str]:
    draw = random.Random(3)
    sound = [" ".join(sentences) for sentences in SENTENCES.values()]
    pool = " ".join(sound)
    cuts = [pool[start : start + draw.randrange(1, 1500)] for start in draw.choices(range(len(pool)), k=600)]
    noise = ["".join(chr(draw.randrange(1, 0x3000)) for _ in range(draw.randrange(300))) for _ in range(200)]
    shouted = [text.upper() for text in cuts[:100]]
    return [*sound, *cuts, *noise, *shouted, "", " ", "1 2 3", "\ud800", "e\u0301" * 700, "a" * 5000]


def test_the_answers_are_those_of_py3langid(theirs: LanguageIdentifier) -> None:
    for text in texts():
        code, score = identify(text)
        expected, expected_score = theirs.classify(text[:LOOKED_AT_CHARS])
        assert code == expected, text[:80]
        assert score == pytest.approx(expected_score, abs=5e-4)


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_are_in_their_language(language: str) -> None:
    code, score = identify(" ".join(SENTENCES[language]))
    assert code == language
    assert score > 0.8


def test_an_answer_does_not_depend_on_what_was_asked_before() -> None:
    first = [identify(text) for text in texts()[:100]]
    assert [identify(text) for text in reversed(texts()[:100])] == first[::-1]


def test_the_codes_are_those_of_the_model(theirs: LanguageIdentifier) -> None:
    assert set(theirs.labels) == CODES


def test_which_languages_stay() -> None:
    languages = Languages(keep=("en", "de"), min_score=0.7)
    assert languages.keeps("de", 0.7)
    assert not languages.keeps("de", 0.69)
    assert not languages.keeps("fr", 1.0)


def test_a_language_the_model_does_not_know_is_an_error() -> None:
    with pytest.raises(ValidationError, match="english: no language of the model; fix: use codes out of ace af"):
        Languages(keep=("en", "english"))
    with pytest.raises(ValidationError, match="keep"):
        Languages(keep=())
