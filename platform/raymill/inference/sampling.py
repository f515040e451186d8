"""Choosing the next token: rows of logits and one `Sampler` per request in, ids (and log probabilities) out.

What is done to a row, in this order: log probabilities are taken of the raw logits; then the grammar's mask, logit_bias,
repetition, frequency and presence penalty, temperature, top_k, min_p, top_p, and the draw. Temperature 0 takes the
largest after the penalties; among equals the lowest id is first everywhere.

A draw is a pure function of the row's logits, the request's settings and tokens, its seed and the token's number in the
completion: it does not depend on the batch, on earlier draws or on a generator's state, so a completion can be taken up
again at any token. It is counted in whole numbers: a token weighs round(2**43 * exp((logit - largest) / temperature)), so
cuts and draws are sums of integers that no order of addition changes, and compiled code (native/sample.cpp) and numpy
(draws.py) take the same token.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymill.inference import compiled_draws, draws
from raymill.inference.grammar import Mask, Match
from raymill.inference.step import Floats

_log = logging.getLogger(__name__)
NO_TOKEN = -1
"""Chosen where nothing can be: the row's logits are not finite, or the grammar allows no token."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """Logits are divided by it; from 0 (greedy) to 2."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to at least this; from 0 to 1 (1 cuts nothing)."""
    top_k: int | None = None
    """Draw from this many likeliest tokens at most; from 1."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the likeliest; from 0 (cuts nothing) to 1."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the completion has; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the completion has it; from -2 to 2."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or completion are divided by it, negative ones multiplied (Keskar et al. 2019, CTRL,
    arXiv:1909.05858); 0.01 to 2, 1 changes nothing."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit), each id once and below the vocabulary's size; added numbers from -100 to 100."""
    seed: int = 0
    """Any whole number; the same seed draws the same completion."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token and what the model thought of it, before temperature, penalties and cuts."""

    token: int
    logprob: float | None
    """Nats; None for a prompt's first token, which nothing precedes."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (id, nats), likeliest first."""


class Sampler:
    """The choice of one request's tokens: its settings, and what of its tokens the penalties and the grammar need."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: tuple[int, ...] = (),
        match: Match | None = None,
        logprobs: int | None = None,
    ) -> None:
        self.sampling, self.match, self.logprobs = sampling, match, logprobs
        self.number = 0
        """Tokens that the completion has."""
        penalizes = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        self._places: dict[int, int] | None = {} if penalizes else None
        self.seen_ids, self.seen_counts = array("i"), array("i")
        """What the penalties touch, and how often the completion has each."""
        if sampling.repetition_penalty != 1.0:
            for token in prompt_ids:
                self._see(token)
        self.is_plain = not (
            sampling.temperature or penalizes or sampling.logit_bias or match is not None or logprobs is not None
        )
        """Whether the largest logit is all that is asked for."""
        self.compiled: compiled_draws.Choice | None = None
        """The same for the compiled code, made when first asked for."""

    def push(self, token: int) -> None:
        """Takes the token that came. ValueError where the grammar forbids it."""
        if self.match is not None:
            self.match.advance(token)
        self.number += 1
        if self._places is not None:
            self.seen_counts[self._see(token)] += 1

    def mask(self) -> Mask:
        """What the grammar allows: nothing where it fails, so that its own request ends and not the step of all."""
        assert self.match is not None
        try:
            return self.match.mask()
        except Exception:
            _log.exception("a grammar failed; its completion ends")
            return np.zeros(1, np.uint32)

    def _see(self, token: int) -> int:
        assert self._places is not None
        place = self._places.setdefault(token, len(self._places))
        if place == len(self.seen_ids):
            self.seen_ids.append(token)
            self.seen_counts.append(0)
        return place


def choose(
    logits_NV: Floats, rows: Sequence[int], samplers: Sequence[Sampler]
) -> list[tuple[int, TokenLogprob | None]]:
    """The next id of logits row rows[i] for samplers[i], and its log probability where that is asked for.

    NO_TOKEN where a row has no choice. Changes neither the logits nor the samplers: `Sampler.push` what is taken.
    """
    library = compiled_draws.functions()
    if library is None:
        return [_choose(logits_NV[row], sampler) for row, sampler in zip(rows, samplers, strict=True)]
    if all(sampler.is_plain for sampler in samplers):
        return [(token, None) for token in compiled_draws.argmax(library, logits_NV, rows)]
    choices, masks = [], []  # masks must live until they are read
    for row, sampler in zip(rows, samplers, strict=True):
        choice = sampler.compiled = sampler.compiled or _compiled(sampler)
        choice.row = row
        if sampler.sampling.temperature:
            choice.point = int(uniform(sampler.sampling.seed, sampler.number) * 2.0**53)
        if sampler.match is not None:
            masks.append(mask := sampler.mask())
            choice.set_mask(mask)
        choice.set_seen(sampler.seen_ids, sampler.seen_counts)
        choices.append(choice)
    compiled_draws.choose(library, logits_NV, choices)
    return [
        (choice.token, _logprob(choice, logits_NV.shape[1]) if choice.num_top >= 0 <= choice.token else None)
        for choice in choices
    ]


def score(logits_NV: Floats, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """How likely each row holds its target, with the `top` likeliest beside it."""
    assert len(logits_NV) == len(targets)
    library = compiled_draws.functions()
    if library is None:
        found = [draws.logprob(row, token, top) for row, token in zip(logits_NV, targets, strict=True)]
    else:
        found = compiled_draws.score(library, logits_NV, targets, top)
    return [TokenLogprob(token, *each) for token, each in zip(targets, found, strict=True)]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) from a seed and a counter; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def _choose(logits_V: Floats, sampler: Sampler) -> tuple[int, TokenLogprob | None]:
    if not np.isfinite(logits_V).all():
        return NO_TOKEN, None
    edited_V = _edit(logits_V, sampler)
    largest = int(edited_V.argmax())
    if edited_V[largest] == -np.inf:
        return NO_TOKEN, None
    sampling = sampler.sampling
    token = largest
    if sampling.temperature:
        weights_V = draws.weigh(edited_V, sampling.temperature)
        point = uniform(sampling.seed, sampler.number)
        token = draws.draw(weights_V, sampling.top_k, sampling.min_p, sampling.top_p, point)
    if sampler.logprobs is None:
        return token, None
    return token, TokenLogprob(token, *draws.logprob(logits_V, token, sampler.logprobs))


def _edit(logits_V: Floats, sampler: Sampler) -> Floats:
    sampling, edited_V = sampler.sampling, logits_V.copy()
    if sampler.match is not None:
        edited_V[~draws.allowed(sampler.mask(), len(edited_V))] = -np.inf
    if sampling.logit_bias:
        draws.add(edited_V, *[np.array(column) for column in zip(*sampling.logit_bias, strict=True)])
    if sampler.seen_ids:
        ids, counts = np.array(sampler.seen_ids), np.array(sampler.seen_counts)
        draws.penalize(
            edited_V,
            ids,
            counts,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
    return edited_V


def _compiled(sampler: Sampler) -> compiled_draws.Choice:
    sampling = sampler.sampling
    return compiled_draws.Choice(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k or 0,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
    ).prepared(sampling.logit_bias, sampler.logprobs)


def _logprob(choice: compiled_draws.Choice, vocab_size: int) -> TokenLogprob:
    return TokenLogprob(choice.token, choice.logprob, choice.top(vocab_size))
