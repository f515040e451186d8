"""What is done to one document, in this order; each step belongs to a file of its own.

    repair, composed characters and line ends, language, quality rules, bad words, evaluation text, redaction,
    changes of spelling that the job asked for

A document of parts is cleaned part by part and judged as a whole; the white space at the ends of a part is its author's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from raymill.corpus.bad_words import BadWords, count_bad, load_bad_words
from raymill.corpus.decontaminate import Index, contaminated, load_index
from raymill.corpus.document import Document, Part
from raymill.corpus.filters import Rules, judge
from raymill.corpus.languages import Languages, identify
from raymill.corpus.normalize import Normalization, normalize
from raymill.corpus.pii import Pii, redact
from raymill.corpus.repair import repair

EXCERPT_CHARS = 300
_NUMBERS = ("phone", "ip", "card")
_NOT_SHOWN = ("bad_words", "contaminated")
_AS_IT_IS = Normalization()


@dataclass(frozen=True)
class Evaluation:
    """Text that training may not hold."""

    index: Path
    """What `decontaminate.save_index` wrote."""
    min_hits: int
    """Matching grams from which on a document is dropped."""


@dataclass(frozen=True)
class Steps:
    """Which steps, and how; what is None is left out."""

    repair: bool
    normalization: Normalization
    languages: Languages | None
    rules: Rules
    bad_words: BadWords | None
    evaluation: Evaluation | None
    pii: Pii | None


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A document after all steps, or after the one that dropped it."""

    document: Document
    reason: str | None
    """Why it is dropped; None: it stays."""
    language: str | None
    changes: dict[str, int]
    """What was changed in it: repaired, removed_lines, redacted_<kind>."""


def clean(document: Document, steps: Steps) -> Cleaned:
    """One document through all steps; the first that objects ends it."""
    changes: dict[str, int] = {}
    document = _mend(document, steps, changes)
    language = None
    if steps.languages is not None and document.text and document.kind != "code":
        language, score = identify(document.text)
        if not steps.languages.keeps(language, score):
            return Cleaned(document, "language", language, changes)
    rules = steps.rules if language in (None, "en") else _without_stop_words(steps.rules)
    verdict = judge(document.text, document.kind, rules)
    if verdict.removed_lines:
        changes["removed_lines"] = verdict.removed_lines
        document = replace(document, text=verdict.text)
    reason = verdict.reason or _judge_words(document, steps)
    if reason is None and steps.pii is not None:
        document = _redact(document, steps.pii, changes)
    if reason is None and steps.normalization != _AS_IT_IS:  # last: the rules look at case, marks and stop words
        document = _each_part(document, partial(normalize, options=steps.normalization))
        reason = "empty" if not document.text.strip() else None
    return Cleaned(document, reason, language, changes)


def make_excerpt(cleaned: Cleaned, pii: Pii | None) -> str:
    """The beginning of a dropped document, to be shown; without what it was dropped for, and without personal data."""
    if cleaned.reason in _NOT_SHOWN:
        return ""
    excerpt = cleaned.document.text[:EXCERPT_CHARS]
    return redact(excerpt, pii)[0] if pii is not None else excerpt


def _mend(document: Document, steps: Steps, changes: dict[str, int]) -> Document:
    def mend(text: str) -> str:
        # In source code an odd sequence is meant: "&amp;" in a string, a table of broken letters.
        repaired = repair(text) if steps.repair and document.kind != "code" else text
        if repaired != text:
            changes["repaired"] = changes.get("repaired", 0) + 1
        return normalize(repaired)

    return _each_part(document, mend)


def _each_part(document: Document, change: Callable[[str], str]) -> Document:
    """The document with its text, or each of its parts' texts, changed."""
    if not document.parts:
        text = change(document.text)
        return document if text is document.text else replace(document, text=text)
    parts = []
    for part in document.parts:
        inner = part.text.strip()
        start = part.text.find(inner)
        parts.append(replace(part, text=part.text[:start] + change(inner) + part.text[start + len(inner) :]))
    return _with_parts(document, parts)


def _judge_words(document: Document, steps: Steps) -> str | None:
    if steps.bad_words is not None:
        count = count_bad(document.text, load_bad_words(steps.bad_words.words))
        if count.is_over(steps.bad_words.max_share):
            return "bad_words"
    if steps.evaluation is not None:
        hits = contaminated(document.text, _load_index(steps.evaluation.index))
        if hits >= steps.evaluation.min_hits:
            return "contaminated"
    return None


@lru_cache(maxsize=1)
def _load_index(path: Path) -> Index:
    """Once per worker, not once per document."""
    return load_index(path)


def _redact(document: Document, pii: Pii, changes: dict[str, int]) -> Document:
    if document.kind == "code":
        pii = _for_code(pii)
    found: Counter[str] = Counter()
    parts = []
    for part in document.parts or (Part(document.text, None, True),):
        text, counts = redact(part.text, pii)
        found += counts
        parts.append(replace(part, text=text))
    if not found:
        return document
    changes.update({f"redacted_{kind}": count for kind, count in found.items()})
    return _with_parts(document, parts) if document.parts else replace(document, text=parts[0].text)


@lru_cache(maxsize=8)
def _without_stop_words(rules: Rules) -> Rules:
    """For text that is told to be in another language: the rule counts English words."""
    return replace(rules, min_stop_words=0)


@lru_cache(maxsize=8)
def _for_code(pii: Pii) -> Pii:
    """Source code is full of numbers that look like phones, addresses and cards, and are none."""
    return pii.model_copy(update={"kinds": tuple(kind for kind in pii.kinds if kind not in _NUMBERS)})


def _with_parts(document: Document, parts: list[Part]) -> Document:
    return replace(document, text="".join(part.text for part in parts), parts=tuple(parts))
