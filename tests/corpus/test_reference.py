"""Decisions, reasons and cleaned texts equal datatrove's: recorded ones, and live ones where datatrove can be imported."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raymill.corpus.filters import Rules, judge
from raymill.corpus.word_facts import CHARS_SHIFT
from raymill.corpus.words import WordSplitter

Prose = Callable[[int], str]
RECORDED = json.loads(Path(__file__).with_name("reference.json").read_bytes())
"""From datatrove 0.10.1: its reason per case and filter, and the hash of the cleaned text of what C4's filter keeps."""
SOURCE = Path(json.__file__).parents[1]

RULES = {
    "repetition": Rules(frozenset({"gopher_repetition"}), cut_notices=False),
    "quality": Rules(frozenset({"gopher_quality"}), cut_notices=False),
    "c4": Rules(
        frozenset({"c4_lines", "c4_page"}),
        min_sentences=5,
        drop_curly_brackets=True,
        require_terminal_punctuation=True,
        cut_notices=False,
    ),
    "c4_any_end": Rules(frozenset({"c4_lines", "c4_page"}), cut_notices=False),
    "fineweb": Rules(frozenset({"fineweb"}), cut_notices=False),
}
OURS = {
    "repeated_paragraphs": "dup_para_frac dup_para_char_frac",
    "repeated_lines": "dup_line_frac dup_line_char_frac",
    "frequent_phrase": "top_2_gram top_3_gram top_4_gram",
    "repeated_phrases": " ".join(f"duplicated_{size}_n_grams" for size in range(5, 11)),
    "too_short": "gopher_short_doc",
    "word_length": "gopher_below_avg_threshold gopher_above_avg_threshold",
    "symbols": "gopher_too_many_hashes gopher_too_many_ellipsis",
    "bullets": "gopher_too_many_bullets",
    "ellipsis_lines": "gopher_too_many_end_ellipsis",
    "few_letters": "gopher_below_alpha_threshold",
    "few_stop_words": "gopher_enough_stop_words",
    "few_sentences": "too_few_sentences",
    "few_ended_lines": "line_punct_ratio empty",
    "short_lines": "short_line_ratio",
    "repeated_page_lines": "char_dup_ratio",
    "list": "list_ratio",
    "lorem_ipsum": "lorem_ipsum",
    "curly_bracket": "curly_bracket",
}
REASON_OF = {theirs: ours for ours, names in OURS.items() for theirs in names.split()}
CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "plain": lambda text, draw: text,
    "short": lambda text, draw: text[: draw.randint(60, 400)],
    "paragraphs again": lambda text, draw: text + "\n\n" + text[: draw.randint(0, len(text))],
    "lines again": lambda text, draw: re.sub(
        "\n+", "\n", text + "\n" + text[: draw.randint(len(text) // 3, len(text))]
    ),
    "one line": lambda text, draw: text.replace("\n", " "),
    "a phrase": lambda text, draw: re.sub(
        " every ", lambda found: draw.choice([" every ", " at the end of a long day "]), text
    ),
    "hashes": lambda text, draw: re.sub(" ", lambda found: draw.choice([" ", " ", " ", " #", " # "]), text),
    "dots": lambda text, draw: re.sub(r"\.\s+", lambda found: draw.choice([". ", "... ", "\u2026\n", "...\n"]), text),
    "bullets": lambda text, draw: "".join(
        draw.choice(["- ", " \u2022 "] * 9 + ["* "]) + line + "\n" for line in re.split(r"(?<=\.)\s+", text)
    ),
    "numbers": lambda text, draw: re.sub(
        r"\w{5,}", lambda found: found[0] if draw.random() < 0.7 else f"{draw.random():.3g}", text
    ),
    "no stop words": lambda text, draw: re.sub(r"\b(the|of|to|and|with)\b", "sur", text),
    "contractions": lambda text, draw: re.sub(
        " every ",
        lambda found: draw.choice([" can't ", " y'all'd've ", " 5km ", ":) ", " e.g. ", "-", "/", ",", "\u2019s "]),
        text,
    ),
    "symbols": lambda text, draw: re.sub(
        " ",
        lambda found: draw.choice(
            [" ", " ", " ", "  ", "\t", "\u3000", " \U0001f600", ":", ")", " $", '"', "\u4e16\u754c"]
        ),
        text,
    ),
    "no ends": lambda text, draw: re.sub(r"\.", lambda found: draw.choice([".", "", "", ";"]), text),
    "notices": lambda text, draw: re.sub(
        r"\. ", lambda found: draw.choice([".\n", " without JavaScript.\n", ".\nWe use cookies. ", ".\nHome\n"]), text
    ),
    "citations": lambda text, draw: re.sub(
        r"\.", lambda found: draw.choice([".", "[1].", ".[23]", "[citation needed].", "[edit]", ".[note]"]), text
    ),
    "lorem": lambda text, draw: text.replace(".", ". Lorem Ipsum", 1 + draw.randint(0, 1)),
    "curly": lambda text, draw: text.replace(". ", draw.choice([". {x} ", ".\n{\n"]), 1),
    "long words": lambda text, draw: re.sub(r"(\w+)", r"\1\1\1", text) + "\n" + "x" * 1001 + " of the end.",
    "short words": lambda text, draw: re.sub(r"(\w{1,2})\w*", r"\1", text),
    "short lines": lambda text, draw: re.sub(r" (of|every|near) ", draw.choice([".\n", "\n"]), text),
    "blank lines": lambda text, draw: text.replace("\n\n", "\n" * draw.randint(2, 40)),
    "line feeds": lambda text, draw: re.sub(" ", lambda found: draw.choice([" ", "\n", "\n\n", "\u2028"]), text),
}


def texts(prose: Prose) -> dict[str, str]:
    """Three prose texts, each with every change."""
    return {
        f"{name} {seed}": change(prose(seed), random.Random(seed)).strip()
        for name, change in CHANGES.items()
        for seed in range(3)
    }


def outcome(text: str, rules: Rules) -> list[str | None]:
    """The reason, or the hash of the text that is kept."""
    verdict = judge(text, "prose", rules)
    return [verdict.reason, None if verdict.reason else digest(verdict.text)]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("change", CHANGES)
def test_recorded(prose: Prose, change: str) -> None:
    for name, text in texts(prose).items():
        if name.startswith(change):
            assert {rule: outcome(text, rules) for rule, rules in RULES.items()} == RECORDED[name], name


def test_the_record_has_every_reason() -> None:
    reasons = {reason for case in RECORDED.values() for reason, _ in case.values()}
    assert reasons == {None, *OURS}


def reference_outcomes(text: str) -> dict[str, list[str | None]]:
    from datatrove.data import Document
    from datatrove.pipeline import filters

    chain = {
        "repetition": filters.GopherRepetitionFilter(),
        "quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(),
        "c4_any_end": filters.C4QualityFilter(
            filter_no_terminal_punct=False, filter_curly_bracket=False, min_num_sentences=3
        ),
        "fineweb": filters.FineWebQualityFilter(),
    }
    outcomes: dict[str, list[str | None]] = {}
    for name, each in chain.items():
        document = Document(text=text, id="")
        verdict = each.filter(document)
        kept = verdict is True
        outcomes[name] = [None if kept else REASON_OF[verdict[1]], digest(document.text) if kept else None]
    return outcomes


def test_live(prose: Prose) -> None:
    """The same texts, and documentation of the standard library, by datatrove itself."""
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    from datatrove.utils.text import split_into_words

    sources = sorted(SOURCE.glob("*.py"))[::10]
    documents = [*texts(prose).values(), *(path.read_text(errors="replace")[:5000].strip() for path in sources)]
    splitter = WordSplitter()
    for text in documents:
        assert {rule: outcome(text, rules) for rule, rules in RULES.items()} == reference_outcomes(text), text[:200]
        _, facts = splitter.split(np.frombuffer(text.encode(), np.uint8))
        assert (facts >> CHARS_SHIFT).tolist() == [len(word) for word in split_into_words(text)], text[:200]
