"""Continuation choice: a task made of held-out text alone, for models too small for anyone's benchmark.

An item is a piece of the stream, what really follows it, and three continuations of other items; the model is right when
it finds the real one the likeliest. Guessing scores 1 in 4. Items lie evenly over the stream, the same for every model
of one vocabulary: figures of a model before and after a change compare item by item.

It says how a model ranks whole continuations, as multiple-choice benchmarks do, and no more: the wrong ones are of other
places, so topic alone goes far. Cost: four rows of 48 tokens an item.

Shapes: I items, O options, B rows = items x options, T context + continuation, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raymill.dataset.shards import TokenStream
from raymill.errors import DataError
from raymill.evaluation.perplexity import Forward

OPTIONS = 4
CONTEXT_TOKENS = 32
CONTINUATION_TOKENS = 16
_ITEMS_AT_ONCE = 16


@dataclass(frozen=True)
class ChoiceScores:
    """How often the real continuation was the likeliest."""

    accuracy: float
    """Share of items."""
    items: int
    """Items asked."""


def choose_continuations(
    forward: Forward, stream: TokenStream, *, max_items: int, max_seq_len: int, device: torch.device | None = None
) -> ChoiceScores:
    """Asks at most `max_items`; a shorter model reads shorter pieces. DataError when the stream is too short for four."""
    length = min(CONTEXT_TOKENS + CONTINUATION_TOKENS, max_seq_len)
    context = length - min(CONTINUATION_TOKENS, length // 3)
    texts_IT = _items(stream, max_items, length)
    right = 0
    for first in range(0, len(texts_IT), _ITEMS_AT_ONCE):
        rows_IOT = _with_options(texts_IT, range(first, min(first + _ITEMS_AT_ONCE, len(texts_IT))), context)
        likelihood_IO = _likelihoods(forward, rows_IOT, context, device)
        right += int((likelihood_IO[:, 0] > likelihood_IO[:, 1:].amax(-1)).sum())
    return ChoiceScores(right / len(texts_IT), len(texts_IT))


def _items(stream: TokenStream, max_items: int, length: int) -> Tensor:
    """Pieces (I, T) inside one document, evenly spread."""
    places = len(stream) // length
    texts = []
    for place in range(0, places, max(1, places // (2 * max_items))):
        text = stream.read(place * length, length)
        if not (text == stream.index.end_of_document_id).any():
            texts.append(text)
    if len(texts) < OPTIONS:
        raise DataError(
            f"the {stream.split} split has {len(texts)} pieces of {length} tokens: too few to choose among",
            fix="give prepare more text, or raise prepare.val_fraction",
        )
    kept = [texts[len(texts) * index // max_items] for index in range(max_items)] if len(texts) > max_items else texts
    return torch.from_numpy(np.stack(kept))


def _with_options(texts_IT: Tensor, items: range, context: int) -> Tensor:
    """Rows (I, O, T): each item's context before its own continuation, then before those of items far from it."""
    total = len(texts_IT)
    rows = []
    for item in items:
        others = [item, *((item + step * total // OPTIONS) % total for step in range(1, OPTIONS))]
        rows.append(torch.stack([torch.cat([texts_IT[item, :context], texts_IT[of, context:]]) for of in others]))
    return torch.stack(rows)


def _likelihoods(forward: Forward, rows_IOT: Tensor, context: int, device: torch.device | None) -> Tensor:
    """Log likelihood (I, O) of what follows the context."""
    rows_BT = rows_IOT.flatten(0, 1)
    if device is not None:
        rows_BT = rows_BT.to(device)
    inputs_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    with torch.inference_mode():
        logits_BTV = forward(inputs_BT, torch.zeros_like(inputs_BT))[:, context - 1 :]
        nats_BT = functional.cross_entropy(logits_BTV.float().mT, targets_BT[:, context - 1 :], reduction="none")
    return -nats_BT.sum(-1).view(rows_IOT.shape[:2])
