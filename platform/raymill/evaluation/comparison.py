"""Two models beside each other on the same held-out text: what a change of one into the other cost.

Both read the same windows and answer the same items (continuation.py), window by window in turn, so figures of the two
compare even where either alone is noisy. Costs two forward passes over the windows and the items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raymill.dataset.shards import TokenStream
from raymill.evaluation.continuation import choose_continuations
from raymill.evaluation.perplexity import Forward, Sums, choose_windows, sum_windows


@dataclass(frozen=True)
class Quality:
    """How good a model is on a split."""

    perplexity: float
    accuracy: float
    """Share of tokens that were the model's first choice."""
    choice_accuracy: float
    """Share of pieces of text whose real continuation was likelier than three others."""


def compare(
    models: tuple[Forward, Forward],
    stream: TokenStream,
    *,
    seq_len: int,
    max_sequences: int,
    max_choices: int,
    batch_size: int,
    on_sequences: Callable[[int, int], None],
) -> tuple[Quality, Quality]:
    """The qualities of both; `on_sequences` is told how many windows of how many are done. DataError without text."""
    windows = choose_windows(stream, seq_len, max_sequences)
    sums = [Sums(), Sums()]
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        for which, model in enumerate(models):
            sums[which] += sum_windows(model, stream, part, seq_len=seq_len, batch_size=batch_size)
        on_sequences(first + len(part), len(windows))
    found = []
    for model, summed in zip(models, sums, strict=True):
        scores = summed.scores(stream)
        choice = choose_continuations(model, stream, max_items=max_choices, max_seq_len=seq_len)
        found.append(Quality(scores.perplexity, scores.accuracy, choice.accuracy))
    return found[0], found[1]
