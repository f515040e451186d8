"""How often our filters and datatrove's say the same of a document, and where they differ.

Equal decision: both keep it or both drop it. Equal class: also for the same kind of reason, by the names below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

CLASSES = {
    "repetition": (
        "repeated_lines", "repeated_paragraphs", "frequent_phrase", "repeated_phrases",
        "dup_line_frac", "dup_line_char_frac", "dup_para_frac", "dup_para_char_frac",
        *(f"top_{size}_gram" for size in (2, 3, 4)), *(f"duplicated_{size}_n_grams" for size in range(5, 11)),
    ),
    "too short": ("too_short", "gopher_short_doc"),
    "too long": ("too_long", "gopher_long_doc"),
    "word length": ("word_length", "gopher_below_avg_threshold", "gopher_above_avg_threshold"),
    "symbols": ("symbols", "gopher_too_many_hashes", "gopher_too_many_ellipsis"),
    "bullets": ("bullets", "gopher_too_many_bullets"),
    "ellipsis lines": ("ellipsis_lines", "gopher_too_many_end_ellipsis"),
    "letters": ("few_letters", "gopher_below_alpha_threshold"),
    "stop words": ("few_stop_words", "gopher_enough_stop_words"),
    "lorem ipsum": ("lorem_ipsum",),
    "curly bracket": ("curly_bracket",),
    "sentences": ("few_sentences", "too_few_sentences"),
    "empty": ("empty",),
}  # fmt: skip
_CLASS_OF = {reason: name for name, reasons in CLASSES.items() for reason in reasons}


@dataclass(frozen=True)
class Agreement:
    documents: int
    decisions: float
    """Share of documents that both keep or both drop."""
    classes: float
    """Share for which also the class of the reason is the same."""
    texts: float
    """Share of the documents both keep of which both leave the same text."""
    differences: list[tuple[str, str, int]]
    """(ours, theirs, documents), most frequent first."""


Verdicts = Sequence[tuple[str | None, str]]
"""Per document the reason, None where it is kept, and a digest of the text that is left."""


def compare(ours: Verdicts, theirs: Verdicts) -> Agreement:
    """Both speak of the same documents in the same order."""
    pairs = [(class_of(one), class_of(other)) for (one, _), (other, _) in zip(ours, theirs, strict=True)]
    kept = [pair for pair in zip(ours, theirs, strict=True) if pair[0][0] is None and pair[1][0] is None]
    texts = sum(one == other for (_, one), (_, other) in kept) / max(1, len(kept))
    decisions = sum((one == "kept") == (other == "kept") for one, other in pairs)
    classes = sum(one == other for one, other in pairs)
    different = Counter(pair for pair in pairs if pair[0] != pair[1])
    listed = [(one, other, count) for (one, other), count in different.most_common()]
    return Agreement(len(pairs), decisions / max(1, len(pairs)), classes / max(1, len(pairs)), texts, listed)


def class_of(reason: str | None) -> str:
    """A reason that no class knows is a class of its own."""
    return "kept" if reason is None else _CLASS_OF.get(reason, reason)
