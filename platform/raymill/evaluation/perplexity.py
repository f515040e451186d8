"""Perplexity: how well a model predicts held-out text it never trained on.

In: anything that turns ids into logits, and a token stream. Out: loss, perplexity, bits per byte, next-token accuracy.
Costs one forward pass over the stream; memory for one batch of logits and a 2,048-row fp32 copy.

Shapes: B batch, T sequence, V vocabulary, N tokens.

Windows of seq_len ids do not overlap, so a token has on average seq_len / 2 tokens of context: a shorter seq_len reads
worse for the same model. Compare figures of one seq_len only. Bits per byte do compare across tokenizers. Attention
stays inside a document: what precedes it in the stream is chance, and no request will have it.

Where the stream says that some ids are not to be learned (a prompt, a user's turn), they are read but not predicted:
loss, perplexity, accuracy and tokens speak of the others. How many bytes of text those stand for is not known, so there
are no bits per byte then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raymill.dataset.loader import IGNORE
from raymill.dataset.shards import TokenStream
from raymill.errors import DataError

Forward = Callable[[Tensor, Tensor], Tensor]
"""ids_BT and documents_BT, both int64, to logits_BTV; attention keeps to positions of equal document number."""

_ROWS = 2048
"""Rows of logits normalised at once: 2,048 x 32k x 4 bytes = 256 MiB at the largest vocabulary we train."""


@dataclass(frozen=True)
class Scores:
    """Language-model figures of one model on one stream."""

    loss_nats: float
    """Mean negative log-likelihood of a token, nats."""
    perplexity: float
    """exp(loss_nats)."""
    bits_per_byte: float | None
    """Bits needed for one UTF-8 byte of the text; None where only some of the text is predicted."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    tokens: int
    """Tokens predicted."""


def describe_loss(loss_nats: float | None, bits_per_byte: float | None) -> str:
    """The one figure of a result line: bits per byte, where they are known."""
    if loss_nats is None:
        return "loss that is no number"
    return f"{bits_per_byte:.3f} bits per byte" if bits_per_byte is not None else f"{loss_nats:.3f} nats per token"


@dataclass(frozen=True)
class Sums:
    """What windows add up to; sums of disjoint windows add up to the sums of all."""

    nats: float = 0.0
    """Negative log-likelihood of every token predicted."""
    right: int = 0
    """Tokens that were the model's first choice."""
    tokens: int = 0
    """Tokens predicted."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.nats + other.nats, self.right + other.right, self.tokens + other.tokens)

    def scores(self, stream: TokenStream) -> Scores:
        """As figures of the stream that the windows were read from. DataError when nothing in them is to be learned."""
        if not self.tokens:
            raise DataError(
                f"nothing in the {stream.split} split is to be learned",
                why="its learn mask leaves out every id that was read",
                fix="give prepare documents with turns or columns to learn, or raise prepare.val_fraction",
            )
        loss_nats = self.nats / self.tokens
        # Bytes are known per split, not per window: a partial evaluation counts the split's mean bytes for each token.
        bytes_per_token = stream.index.text_bytes(stream.split) / stream.index.tokens(stream.split)
        return Scores(
            loss_nats=loss_nats,
            perplexity=math.exp(loss_nats) if loss_nats < 700 else math.inf,
            bits_per_byte=None if stream.has_learn_mask else loss_nats / math.log(2) / bytes_per_token,
            accuracy=self.right / self.tokens,
            tokens=self.tokens,
        )


def evaluate_stream(
    forward: Forward,
    stream: TokenStream,
    *,
    seq_len: int,
    max_sequences: int | None,
    batch_size: int,
    device: torch.device | None = None,
) -> Scores:
    """Scores `forward` on the whole stream, or on `max_sequences` windows spread over it.

    The whole stream includes a shorter last window, so every token but the first is predicted exactly once.
    DataError when the stream has nothing to predict.
    """
    windows = choose_windows(stream, seq_len, max_sequences)
    return sum_windows(forward, stream, windows, seq_len=seq_len, batch_size=batch_size, device=device).scores(stream)


def choose_windows(stream: TokenStream, seq_len: int, max_sequences: int | None) -> range:
    """All windows of the stream, the shorter last one included, or at most `max_sequences` spread evenly over it.

    DataError when there is nothing to predict.
    """
    if len(stream) < 2:
        raise DataError(
            f"the {stream.split} split has {len(stream)} token(s): nothing to predict",
            fix="give prepare more text, or raise prepare.val_fraction",
        )
    windows = range(math.ceil((len(stream) - 1) / seq_len))
    if max_sequences is None or max_sequences >= len(windows):
        return windows
    return windows[:: len(windows) // max_sequences][:max_sequences]


def sum_windows(
    forward: Forward,
    stream: TokenStream,
    windows: range,
    *,
    seq_len: int,
    batch_size: int,
    device: torch.device | None = None,
) -> Sums:
    """Sums over some windows of the stream, so that several processes can share one."""
    sums = Sums()
    with torch.inference_mode():
        for ids_BT, targets_BT in _batches(stream, seq_len, windows, batch_size):
            tokens = int((targets_BT != IGNORE).sum())
            if device is not None:
                ids_BT, targets_BT = ids_BT.to(device), targets_BT.to(device)
            inputs_BT = ids_BT[:, :-1]
            logits_BTV = forward(inputs_BT, (inputs_BT == stream.index.end_of_document_id).cumsum(1))
            nats, right = _score(logits_BTV.flatten(0, 1), targets_BT.flatten())
            sums += Sums(nats, right, tokens)
    return sums


def _batches(stream: TokenStream, seq_len: int, windows: range, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of seq_len + 1 ids, the last id of one being the first of the next, and their targets.

    The shorter last window comes alone.
    """
    whole = (len(stream) - 1) // seq_len
    full = windows[:-1] if windows and windows[-1] >= whole else windows
    for first in range(0, len(full), batch_size):
        numbers = full[first : first + batch_size]
        yield _read(stream, [number * seq_len for number in numbers], seq_len + 1)
    if len(full) < len(windows):
        yield _read(stream, [whole * seq_len], len(stream) - whole * seq_len)


def _read(stream: TokenStream, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """The `count` ids from each start on, and all but the first as targets, IGNORE where not to be learned."""
    ids = np.stack([stream.read(start, count) for start in starts])
    targets = ids[:, 1:]
    if stream.has_learn_mask:
        targets = np.where(np.stack([stream.learned(start + 1, count - 1) for start in starts]), targets, IGNORE)
    return torch.from_numpy(ids), torch.from_numpy(targets)


def _score(logits_NV: Tensor, targets_N: Tensor) -> tuple[float, int]:
    """Summed nats and correct first choices over the tokens of N that are not IGNORE."""
    nats, right = 0.0, 0
    for logits, targets in zip(logits_NV.split(_ROWS), targets_N.split(_ROWS), strict=True):
        nats += functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE).item()
        right += int((logits.argmax(-1) == targets).sum())
    return nats, right
