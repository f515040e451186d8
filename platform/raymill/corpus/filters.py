"""Keep a document, or drop it for one named reason. A profile per kind of text.

Prose: any of five sets of rules, in this order: the repetition and quality rules of Gopher (Rae et al. 2021, appendix
A1), the rules of C4 on lines and on pages (Raffel et al. 2020), and FineWeb's (Penedo et al. 2024). Thresholds, words
and order are datatrove's, so that its decisions are ours. C4's rules on lines are not used by default: short lines are
headings, verses and speakers in texts that are no web pages; of them only cookie and JavaScript notices are cut.
Code: those thresholds would drop nearly all of it, so it has its own few, after StarCoder (Li et al. 2023).
Chat and tasks are only asked not to be empty. 40 MB/s per core for prose in documents of 3 kB, 34 in a process's first
5 MB; for sources judged as prose 33 and 21. A process needs 0.5 s before its first document, and 9 s once per machine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raymill.corpus import pages, repetition
from raymill.corpus.document import Kind
from raymill.corpus.measures import Bytes, Hashes, Seen, count_repeats, measure_code, new_seen, trim
from raymill.corpus.word_facts import Facts
from raymill.corpus.words import WordSplitter

RuleSet = Literal["gopher_repetition", "gopher_quality", "c4_lines", "c4_page", "fineweb"]
DEFAULT_RULES: frozenset[RuleSet] = frozenset({"gopher_repetition", "gopher_quality", "c4_page"})

REASONS = {
    "empty": "nothing but white space, or nothing else is left",
    "too_short": "prose under `min_words` words; code under 3 lines or 100 characters",
    "too_long": "prose over 100,000 words; code over 1,000,000 characters",
    "word_length": "mean length of a word outside 3-10 characters",
    "symbols": "over one # or ellipsis per ten words",
    "bullets": "over 90 % of lines begin with a bullet or a dash",
    "ellipsis_lines": "over 30 % of lines end with an ellipsis",
    "few_letters": "under `min_letter_share` of words hold a letter; in code, under 25 % of characters are letters",
    "few_stop_words": "under `min_stop_words` of: the be to of and that have with",
    "repeated_lines": "over 30 % of lines, or 20 % of characters (code: 30 %), are in lines that stood before",
    "repeated_paragraphs": "over 30 % of paragraphs, or 20 % of characters, are in paragraphs that stood before",
    "frequent_phrase": "the commonest phrase of 2, 3 or 4 words holds over 20, 18 or 16 % of characters",
    "repeated_phrases": "phrases of 5 to 10 words that stood before hold over 15 to 10 % of characters (code: 10 words, 40 %)",
    "lorem_ipsum": "holds the phrase lorem ipsum",
    "curly_bracket": "holds a curly bracket (only with drop_curly_brackets)",
    "few_sentences": "under `min_sentences` sentences",
    "few_ended_lines": "under 12 % of lines end with a mark that ends a sentence",
    "short_lines": "over 67 % of lines have at most 30 characters",
    "repeated_page_lines": "over 1 % of characters are in lines that stood before, by the rules for web pages",
    "list": "over 3 line feeds per ten words",
    "long_lines": "code with a line over 1,000 characters, or 100 in the mean",
    "generated": "code that says in its first lines that a program wrote it",
    "exact_duplicate": "the same text as an earlier document",
    "near_duplicate": "about 3 of 4 word 5-grams are those of an earlier document",
}
"""Every reason a readable document can be dropped for."""

_WORD_REASONS = {
    repetition.TOO_LONG: "too_long",
    repetition.WORD_LENGTH: "word_length",
    repetition.SYMBOLS: "symbols",
    repetition.FEW_LETTERS: "few_letters",
    repetition.FEW_STOP_WORDS: "few_stop_words",
}
_BEFORE_LISTS = (repetition.TOO_LONG, repetition.WORD_LENGTH, repetition.SYMBOLS)
_PHRASE_REASONS = {repetition.FREQUENT: "frequent_phrase", repetition.REPEATED: "repeated_phrases"}
_PAGE_REASONS = {pages.LOREM_IPSUM: "lorem_ipsum", pages.CURLY_BRACKET: "curly_bracket"}
_FINEWEB_REASONS = {
    pages.FEW_ENDED_LINES: "few_ended_lines",
    pages.SHORT_LINES: "short_lines",
    pages.REPEATED_LINES: "repeated_page_lines",
    pages.LIST_OF_LINES: "list",
}
_NOTICE = re.compile(
    r"javascript.{0,40}\b(?:enabled?|disabled|browser|required)\b|\b(?:enable|requires|turn on)\b.{0,20}javascript"
    r"|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_HINTS = ("javascript", "cookies", "policy", "terms of use")
"""One of them stands in every notice."""
_GENERATED = re.compile(r"auto-?generated|automatically generated|generated (?:by|from)|do not (?:edit|modify)")
_HEADER_LINES = 5
_KEPT_PLACES = 1 << 20


@dataclass(frozen=True)
class Rules:
    """The sets of rules for prose and code, and the few thresholds that jobs change."""

    sets: frozenset[RuleSet] = DEFAULT_RULES
    """None: only empty documents are dropped, code too."""
    min_words: int = 50
    """Prose with fewer words, punctuation not counted, is `too_short`, whatever else is wrong with it."""
    min_letter_share: float = 0.8
    """Prose with a smaller share of words, punctuation included, that hold a letter is `few_letters`."""
    min_stop_words: int = 2
    """Prose with fewer of the eight English stop words is `few_stop_words`; other languages: 0."""
    min_sentences: int = 3
    """Prose with fewer sentences is `few_sentences`; each line is one or more. Web pages: 5."""
    drop_curly_brackets: bool = False
    """C4's rule against code in web pages."""
    require_terminal_punctuation: bool = False
    """The rules on lines cut those that end in none of . ? ! and quotation marks."""
    cut_notices: bool = True
    """Lines that ask for JavaScript, or speak of cookies and terms, are cut before anything is judged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    reason: str | None
    """Why the document is dropped; None: it is kept."""
    text: str
    """The text to keep, without the lines that were cut."""
    removed_lines: int
    """Lines, blank ones not counted, that were cut."""


def judge(text: str, kind: Kind, rules: Rules) -> Verdict:
    """The verdict on one normalised document."""
    if not text or text.isspace():
        return Verdict("empty", text, 0)
    if not rules.sets or kind in ("chat", "task"):
        return Verdict(None, text, 0)
    if kind == "code":
        return Verdict(_judge_code(text), text, 0)
    judges = _THREAD.judges = getattr(_THREAD, "judges", None) or _ProseJudge()
    return judges.judge(text, rules)


_THREAD = threading.local()


class _ProseJudge:
    """Judges the prose of one thread, with tables that are kept between documents."""

    def __init__(self) -> None:
        self._splitter = WordSplitter()
        self._seen = new_seen(1 << 12)

    def judge(self, text: str, rules: Rules) -> Verdict:
        data, removed_lines = text.encode(), 0
        array = np.frombuffer(data, np.uint8)
        marks = pages.Marks(*pages.scan_marks(array))
        if rules.cut_notices and marks.holds & pages.NOTICES:
            text, removed_lines = _cut_notices(text)
            if not text:
                return Verdict("empty", text, removed_lines)
            if removed_lines:
                data = text.encode()
                array = np.frombuffer(data, np.uint8)
                marks = pages.Marks(*pages.scan_marks(array))
        hashes, facts = self._splitter.split(array)
        reason, quality = None, "gopher_quality" in rules.sets
        # Before the repetition rules: in a text of a few words any phrase is frequent, and that tells nobody anything.
        if quality and repetition.is_short(facts, rules.min_words):
            return Verdict("too_short", text, removed_lines)
        if "gopher_repetition" in rules.sets:
            reason = self._judge_repetition(array, len(text), marks, hashes, facts)
        if not reason and quality:
            reason = _judge_quality(array, facts, marks, rules)
        if reason or rules.sets.isdisjoint(_PAGE_SETS):
            return Verdict(reason, text, removed_lines)
        return self._judge_page(Verdict(None, text, removed_lines), array, facts, marks, rules)

    def _judge_repetition(
        self, array: Bytes, text_chars: int, marks: pages.Marks, hashes: Hashes, facts: Facts
    ) -> str | None:
        reason = self._judge_repeated_lines(array, text_chars, marks) if marks.line_feeds else None
        if not reason:
            code = repetition.judge_phrases(hashes, facts, text_chars, self._seen_for(len(facts)))
            reason = _PHRASE_REASONS.get(code)
        return reason

    def _judge_repeated_lines(self, array: Bytes, text_chars: int, marks: pages.Marks) -> str | None:
        seen = self._seen_for(marks.line_feeds + 2)
        if marks.blank_lines:
            start, end = trim(array, 0, len(array))
            paragraphs, repeated, chars = count_repeats(array, start, end, 2, seen)
            if repeated / paragraphs > 0.3 or chars / text_chars > 0.2:
                return "repeated_paragraphs"
        lines, repeated, chars = count_repeats(array, 0, len(array), 1, seen)
        return "repeated_lines" if repeated / lines > 0.3 or chars / text_chars > 0.2 else None

    def _judge_page(self, so_far: Verdict, array: Bytes, facts: Facts, marks: pages.Marks, rules: Rules) -> Verdict:
        """C4's rules and FineWeb's, in that order; the latter see what the former leave of the text."""
        text, removed_lines, reason = so_far.text, so_far.removed_lines, None
        forbidden = pages.LOREM | pages.CURLY * rules.drop_curly_brackets if "c4_page" in rules.sets else 0
        holds = marks.holds & (pages.NOTICES | pages.BRACKET | forbidden)
        if "c4_lines" in rules.sets:
            left = pages.cut_lines(array, holds, rules.require_terminal_punctuation)
            if left.reason:
                return Verdict(_PAGE_REASONS[left.reason], text, removed_lines)
            removed_lines += len(left.stays) - int(left.stays.sum())
            if len(left.text) < len(array):
                if left.edited:
                    facts = self._splitter.split(np.frombuffer(left.text, np.uint8))[1]
                else:
                    facts = pages.keep_lines(facts, left.stays)
                text = left.text.decode().strip()
                array = np.frombuffer(text.encode(), np.uint8)
        elif holds & forbidden:
            reason = "lorem_ipsum" if holds & pages.LOREM else "curly_bracket"
        if not reason and "c4_page" in rules.sets and pages.count_sentences(facts) < rules.min_sentences:
            reason = "few_sentences"
        if not reason and not text:
            reason = "empty"
        if not reason and "fineweb" in rules.sets:
            seen = self._seen_for(text.count("\n") + 2)
            reason = _FINEWEB_REASONS.get(pages.judge_page(array, len(text), len(facts), seen))
        return Verdict(reason, text, removed_lines)

    def _seen_for(self, places: int) -> Seen:
        """A table with room; a very large one is not kept."""
        if 2 * places <= len(self._seen.keys):
            return self._seen
        seen = new_seen(2 * places)
        if places <= _KEPT_PLACES:
            self._seen = seen
        return seen


_PAGE_SETS: frozenset[RuleSet] = frozenset({"c4_lines", "c4_page", "fineweb"})


def _judge_quality(array: Bytes, facts: Facts, marks: pages.Marks, rules: Rules) -> str | None:
    code = repetition.judge_words(facts, marks.hashes, marks.ellipses, rules.min_letter_share, rules.min_stop_words)
    if code not in _BEFORE_LISTS:
        lines, bullets, ellipses = pages.count_marked_lines(array)
        if bullets / lines > 0.9:
            return "bullets"
        if ellipses / lines > 0.3:
            return "ellipsis_lines"
    return _WORD_REASONS.get(code)


def _judge_code(text: str) -> str | None:
    found = measure_code(text.encode())
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
    return "repeated_phrases" if found.repeated_phrase_chars > 0.4 * found.chars else None


def _cut_notices(text: str) -> tuple[str, int]:
    """Looks only at lines that hold a hint: nearly all lines of the few texts that come here hold none."""
    lowered = text.lower()
    if not any(_NOTICE.search(lowered, *line) for line in _hinted_lines(lowered)):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not _is_notice(line.lower())]
    return "\n".join(kept).strip("\n"), len(lines) - len(kept)


def _hinted_lines(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of lines with a hint; one with several kinds of them comes again."""
    for hint in _HINTS:
        at = text.find(hint)
        while at >= 0:
            start, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
            yield start, end if end >= 0 else len(text)
            at = text.find(hint, end) if end >= 0 else -1


def _is_notice(line: str) -> bool:
    return any(hint in line for hint in _HINTS) and _NOTICE.search(line) is not None
