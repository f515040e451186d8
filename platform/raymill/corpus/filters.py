"""Keep a document, or drop it for one named reason. A profile per kind of text: prose and code.

Prose: the quality and repetition rules of Gopher (Rae et al. 2021, appendix A1) and the page rules of C4 (Raffel et al.
2020), thresholds from the papers. C4's rules that cut single lines are not used, except for cookie and JavaScript
notices: short lines are headings, verses and speakers in texts that are no web pages.
Code: those thresholds would drop nearly all of it, so it has its own few, after StarCoder (Li et al. 2023).
Costs 20-50 MB/s per core, nearly all of it in `measure`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from raymill.corpus.document import Kind
from raymill.corpus.measures import Measures, measure

REASONS = {
    "empty": "nothing but white space",
    "too_short": "prose under `min_words` words; code under 3 lines or 100 characters",
    "too_long": "prose over 100,000 words; code over 1,000,000 characters",
    "word_length": "mean length of a word outside 3-10 characters",
    "symbols": "over one # or ellipsis per ten words",
    "bullets": "over 90 % of lines begin with a bullet",
    "ellipsis_lines": "over 30 % of lines end with an ellipsis",
    "few_letters": "under 80 % of words hold a letter; in code, under 25 % of characters are letters",
    "few_stop_words": "under two of: the be to of and that have with",
    "repeated_lines": "over 30 % of lines, or 20 % of characters (code: 30 %), are in lines that stood before",
    "repeated_paragraphs": "over 30 % of paragraphs, or 20 % of characters, are in paragraphs that stood before",
    "frequent_phrase": "the commonest 2-, 3- or 4-gram of words holds over 20, 18 or 16 % of characters",
    "repeated_phrases": "5- to 10-grams that stood before hold over 15 to 10 % of characters (code: 10-grams, 40 %)",
    "lorem_ipsum": "holds the phrase lorem ipsum",
    "curly_bracket": "holds a curly bracket (only with drop_curly_brackets)",
    "few_sentences": "under 3 sentences",
    "long_lines": "code with a line over 1,000 characters, or 100 in the mean",
    "generated": "code that says in its first lines that a program wrote it",
    "exact_duplicate": "the same text as an earlier document",
    "near_duplicate": "about 3 of 4 word 5-grams are those of an earlier document",
}
"""Every reason a readable document can be dropped for."""

_TOP_GRAM_LIMITS = (0.20, 0.18, 0.16)
_REPEATED_GRAM_LIMITS = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
_NOTICE = re.compile(
    r"javascript.{0,40}\b(?:enabled?|disabled|browser|required)\b|\b(?:enable|requires|turn on)\b.{0,20}javascript"
    r"|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_NOTICE_HINTS = ("javascript", "policy", "cookies", "terms of use")
_GENERATED = re.compile(r"auto-?generated|automatically generated|generated (?:by|from)|do not (?:edit|modify)")
_HEADER_LINES = 5


@dataclass(frozen=True)
class Rules:
    """The few thresholds that jobs change."""

    quality: bool
    """Off: only empty documents are dropped."""
    min_words: int
    """Prose with fewer words is `too_short`."""
    drop_curly_brackets: bool
    """C4's rule against code in web pages."""


@dataclass(frozen=True)
class Verdict:
    reason: str | None
    """Why the document is dropped; None: it is kept."""
    text: str
    """The text to keep, without notices."""
    removed_lines: int
    """Lines of cookie and JavaScript notices that were cut."""


def judge(text: str, kind: Kind, rules: Rules) -> Verdict:
    """The verdict on one normalised document."""
    if not text:
        return Verdict("empty", text, 0)
    if not rules.quality:
        return Verdict(None, text, 0)
    if kind == "code":
        return Verdict(_judge_code(text), text, 0)
    lowered = text.lower()
    text, removed_lines = _cut_notices(text, lowered)
    return Verdict(_judge_prose(text, lowered, rules), text, removed_lines)


def _judge_prose(text: str, lowered: str, rules: Rules) -> str | None:
    found = measure(text.encode())
    return _judge_shape(found, rules.min_words) or _judge_repetition(found) or _judge_page(found, lowered, rules)


def _judge_shape(found: Measures, min_words: int) -> str | None:
    if found.words < max(1, min_words):
        return "too_short"
    if found.words > 100_000:
        return "too_long"
    if not 3 <= found.word_chars / found.words <= 10:
        return "word_length"
    if max(found.hashes, found.ellipses) > 0.1 * found.words:
        return "symbols"
    if found.bullet_lines > 0.9 * found.lines:
        return "bullets"
    if found.ellipsis_lines > 0.3 * found.lines:
        return "ellipsis_lines"
    if found.words_with_letter < 0.8 * found.words:
        return "few_letters"
    return "few_stop_words" if found.stop_words < 2 else None


def _judge_repetition(found: Measures) -> str | None:
    if found.repeated_lines > 0.3 * found.lines or found.repeated_line_chars > 0.2 * found.chars:
        return "repeated_lines"
    if found.repeated_paragraphs > 0.3 * found.paragraphs or found.repeated_paragraph_chars > 0.2 * found.chars:
        return "repeated_paragraphs"
    if any(share > limit for share, limit in zip(found.top_gram_shares, _TOP_GRAM_LIMITS, strict=True)):
        return "frequent_phrase"
    if any(share > limit for share, limit in zip(found.repeated_gram_shares, _REPEATED_GRAM_LIMITS, strict=True)):
        return "repeated_phrases"
    return None


def _judge_page(found: Measures, lowered: str, rules: Rules) -> str | None:
    if "lorem ipsum" in lowered:
        return "lorem_ipsum"
    if rules.drop_curly_brackets and "{" in lowered:
        return "curly_bracket"
    return "few_sentences" if found.sentences < 3 else None


def _judge_code(text: str) -> str | None:
    found = measure(text.encode())
    if found.lines < 3 or found.chars < 100:
        return "too_short"
    if found.chars > 1_000_000:
        return "too_long"
    if found.longest_line_chars > 1000 or found.line_chars > 100 * found.lines:
        return "long_lines"
    if found.letters < 0.25 * found.chars:
        return "few_letters"
    if _GENERATED.search("\n".join(text[:2000].lower().split("\n", _HEADER_LINES)[:_HEADER_LINES])):
        return "generated"
    if found.repeated_line_chars > 0.3 * found.chars:
        return "repeated_lines"
    return "repeated_phrases" if found.repeated_gram_shares[-1] > 0.4 else None


def _cut_notices(text: str, lowered: str) -> tuple[str, int]:
    if not any(hint in lowered for hint in _NOTICE_HINTS):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not _NOTICE.search(line.lower())]
    return "\n".join(kept).strip("\n"), len(lines) - len(kept)
