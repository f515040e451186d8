"""Perplexity: how well a model predicts held-out text it never trained on.

In: anything that turns ids into logits, and a token stream. Out: loss, perplexity, bits per byte, next-token accuracy.
Costs one forward pass over the stream; memory for one batch of logits and a 2,048-row fp32 copy.

Windows of seq_len ids do not overlap, so a token has on average seq_len / 2 tokens of context: a shorter seq_len reads
worse for the same model. Compare figures of one seq_len only. Bits per byte do compare across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raymill.dataset.shards import TokenStream
from raymill.errors import DataError

_ROWS = 2048
"""Rows of logits normalised at once: 2,048 x 32k x 4 bytes = 256 MiB at the largest vocabulary we train."""


@dataclass(frozen=True)
class Scores:
    """Language-model figures of one model on one stream."""

    loss_nats: float
    """Mean negative log-likelihood of a token, nats."""
    perplexity: float
    """exp(loss_nats)."""
    bits_per_byte: float
    """Bits needed for one UTF-8 byte of the text."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    tokens: int
    """Tokens predicted."""


def evaluate_stream(
    forward: Callable[[Tensor], Tensor],
    stream: TokenStream,
    *,
    seq_len: int,
    max_sequences: int | None,
    batch_size: int,
    device: torch.device | None = None,
) -> Scores:
    """Scores `forward` (ids_BT int64 -> logits_BTV) on the first `max_sequences` windows, or on the whole stream.

    The whole stream includes a shorter last window, so every token but the first is predicted exactly once.
    DataError when the stream has nothing to predict.
    """
    if len(stream) < 2:
        raise DataError(
            f"the {stream.split} split has {len(stream)} token(s): nothing to predict",
            fix="give prepare more text, or raise prepare.val_fraction",
        )
    nats, right, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for ids_BT in _batches(stream, seq_len, max_sequences, batch_size):
            ids_BT = ids_BT.to(device) if device is not None else ids_BT
            logits_BTV = forward(ids_BT[:, :-1])
            batch_nats, batch_right = _score(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
            nats += batch_nats
            right += batch_right
            tokens += ids_BT.shape[0] * (ids_BT.shape[1] - 1)
    loss_nats = nats / tokens
    # Bytes are known per split, not per window: a partial evaluation counts the split's mean bytes for each token.
    bytes_per_token = stream.index.text_bytes(stream.split) / stream.index.tokens(stream.split)
    return Scores(
        loss_nats=loss_nats,
        perplexity=math.exp(loss_nats) if loss_nats < 700 else math.inf,
        bits_per_byte=loss_nats / math.log(2) / bytes_per_token,
        accuracy=right / tokens,
        tokens=tokens,
    )


def _batches(stream: TokenStream, seq_len: int, max_sequences: int | None, batch_size: int) -> Iterator[Tensor]:
    """Windows of seq_len + 1 ids, the last id of one being the first of the next; then the shorter rest."""
    whole, rest = divmod(len(stream) - 1, seq_len)
    count = whole if max_sequences is None else min(whole, max_sequences)
    for first in range(0, count, batch_size):
        starts = range(first * seq_len, min(first + batch_size, count) * seq_len, seq_len)
        yield torch.from_numpy(np.stack([stream.read(start, seq_len + 1) for start in starts]))
    if rest and (max_sequences is None or whole < max_sequences):
        yield torch.from_numpy(stream.read(whole * seq_len, rest + 1))[None]


def _score(logits_NV: Tensor, targets_N: Tensor) -> tuple[float, int]:
    """Summed nats and correct first choices over N tokens."""
    nats, right = 0.0, 0
    for logits, targets in zip(logits_NV.split(_ROWS), targets_N.split(_ROWS), strict=True):
        nats += functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
    return nats, right
