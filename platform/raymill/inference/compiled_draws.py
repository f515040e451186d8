"""Choosing tokens in compiled code: the seam to native/sample.cpp, for sampling.py.

`functions()` is None where there is no compiler; draws.py then does the same in numpy. One call carries a whole batch.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raymill.inference.native import library
from raymill.inference.native.build import Target
from raymill.inference.step import Floats

Logprob = tuple[float, tuple[tuple[int, float], ...]]

_pointer = ctypes.c_void_p
_double = ctypes.c_double
_int = ctypes.c_int32


class Choice(ctypes.Structure):
    """One row's choice, as native/sample.h explains it; kept for a request's whole life."""

    _fields_ = [
        ("temperature", _double),
        ("top_p", _double),
        ("min_p", _double),
        ("repetition_penalty", _double),
        ("frequency_penalty", _double),
        ("presence_penalty", _double),
        ("point", ctypes.c_uint64),
        ("mask", _pointer),
        ("bias_ids", _pointer),
        ("biases", _pointer),
        ("seen_ids", _pointer),
        ("seen_counts", _pointer),
        ("num_mask_words", _int),
        ("num_biases", _int),
        ("num_seen", _int),
        ("top_k", _int),
        ("row", _int),
        ("num_top", _int),
        ("token", _int),
        ("top_ids", _pointer),
        ("top_logprobs", _pointer),
        ("logprob", _double),
    ]

    def prepared(self, biases: Sequence[tuple[int, float]], num_top: int | None) -> Choice:
        """With its own memory for biases and likeliest tokens."""
        self._bias_ids = (_int * len(biases))(*[token for token, _ in biases])
        self._biases = (_double * len(biases))(*[bias for _, bias in biases])
        self._top_ids, self._top_logprobs = (_int * (num_top or 0))(), (_double * (num_top or 0))()
        self.num_biases, self.num_top = len(biases), -1 if num_top is None else num_top
        for field in ("bias_ids", "biases", "top_ids", "top_logprobs"):
            setattr(self, field, ctypes.addressof(getattr(self, f"_{field}")))
        self.address = ctypes.addressof(self)
        return self

    def set_mask(self, mask: NDArray[np.uint32]) -> None:
        """The caller keeps the mask until the choice is made."""
        assert mask.dtype == np.uint32 and mask.flags.c_contiguous
        self.mask, self.num_mask_words = mask.ctypes.data, len(mask)

    def set_seen(self, ids: array[int], counts: array[int]) -> None:
        """The caller changes neither until the choice is made."""
        self.seen_ids, self.num_seen = ids.buffer_info()
        self.seen_counts = counts.buffer_info()[0]

    def top(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """The likeliest ids with their log probabilities."""
        return tuple(zip(self._top_ids[:vocab_size], self._top_logprobs[:vocab_size], strict=True))


@functools.cache
def functions(target: Target | None = None) -> ctypes.CDLL | None:
    """The compiled functions with their types, by default for this CPU."""
    found = library(target)
    if found is not None:
        size = ctypes.c_int64
        found.raymill_argmax.argtypes = [_pointer, size, _pointer, size, _pointer]
        found.raymill_choose.argtypes = [_pointer, size, _pointer, size]
        found.raymill_score.argtypes = [_pointer, size, size, _pointer, size, _pointer, _pointer, _pointer]
        found.raymill_is_finite.argtypes = [_pointer, size]
        for function in (found.raymill_argmax, found.raymill_choose, found.raymill_score):
            function.restype = None
    return found


def argmax(found: ctypes.CDLL, logits_NV: Floats, rows: Sequence[int]) -> list[int]:
    """The largest logit's id of each row; -1 where a row is not finite."""
    count = len(rows)
    numbers, tokens = (_int * count)(*rows), (_int * count)()
    found.raymill_argmax(_address(logits_NV), logits_NV.shape[1], numbers, count, tokens)
    return tokens[:]


def choose(found: ctypes.CDLL, logits_NV: Floats, choices: Sequence[Choice]) -> None:
    """Each choice's token (-1: none) and log probabilities."""
    count = len(choices)
    pointers = (_pointer * count)(*[choice.address for choice in choices])
    found.raymill_choose(_address(logits_NV), logits_NV.shape[1], pointers, count)


def score(found: ctypes.CDLL, logits_NV: Floats, targets: Sequence[int], top: int) -> list[Logprob]:
    """Each target's log probability and the row's likeliest."""
    rows, vocab_size = logits_NV.shape
    top = min(top, vocab_size)
    wanted = np.array(targets, np.int32)
    assert ((wanted >= 0) & (wanted < vocab_size)).all(), "targets are ids"
    logprobs, ids, likeliest = np.empty(rows), np.empty((rows, top), np.int32), np.empty((rows, top))
    found.raymill_score(
        *(_address(logits_NV), vocab_size, rows, wanted.ctypes.data),
        *(top, logprobs.ctypes.data, ids.ctypes.data, likeliest.ctypes.data),
    )
    pairs = (tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), likeliest.tolist(), strict=True))
    return list(zip(logprobs.tolist(), pairs, strict=True))


def is_finite(numbers: Floats) -> bool:
    """Whether none is NaN or infinite: 2 us for 32,000."""
    found = functions()
    if found is None:
        return bool(np.isfinite(numbers.sum()))
    return bool(found.raymill_is_finite(_address(numbers), numbers.size))


def _address(numbers: Floats) -> int:
    assert numbers.dtype == np.float32 and numbers.flags.c_contiguous
    return numbers.ctypes.data
