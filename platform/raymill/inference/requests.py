"""What is asked of an engine and what it answers, whichever engine it is.

`Engine` is the protocol: `engine.BatchingEngine` is ours, `vllm.VllmEngine` hands the same requests to vLLM. No torch here.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from raymill.inference.sampling import Sampling, TokenLogprob
from raymill.inference.step import Floats

if TYPE_CHECKING:
    from raymill.inference.grammar import Grammar
    from raymill.inference.stream import Stream

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
"""Likeliest tokens that can be asked for beside each token."""


@dataclass(frozen=True)
class Request:
    """One completion to make."""

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    """0 only where prompt_logprobs are asked for: nothing is made then."""
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """The completion ends before the first of these strings."""
    stop_ids: frozenset[int] = frozenset()
    """The completion ends at one of these ids; it is counted, not shown."""
    logprobs: int | None = None
    """Give each token's log probability, and so many of the likeliest tokens beside it; None gives neither."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    grammar: Grammar | None = None
    """What the completion must conform to."""
    adapter: str | None = None
    """The LoRA adapter that is added to the model."""


class TokenEvent(NamedTuple):
    """One token of a completion; the last one may stand for none (max_tokens 0, abort, error)."""

    text: str
    """What it adds to the text; often nothing, while bytes or stop strings are undecided."""
    finish_reason: FinishReason | None = None
    """Set on the last event only."""
    token: TokenLogprob | None = None
    """Set where logprobs are asked for."""
    prompt: tuple[TokenLogprob, ...] | None = None
    """Set on the first event, where prompt_logprobs are asked for."""
    counts: bool = True
    """Whether the event stands for a token that was made."""
    stuck: bool = False
    """Set on a last event of "error" where the grammar leads no further: nothing is wrong with the model."""


@dataclass(frozen=True)
class EngineStats:
    """The engine at one moment."""

    queued: int
    active: int
    num_slots: int
    healthy: bool
    preemptions: int = 0
    """Sequences sent back to the queue because pages ran out, since the start."""


class Engine(Protocol):
    """Serves one model and its adapters. Every method may be called from any thread."""

    @property
    def max_seq_len(self) -> int:
        """Prompt and completion together may have this many tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """LoRA adapters that requests may name."""
        ...

    def submit(self, request: Request) -> Stream:
        """Queues a request. RequestError: outside the model's limits (400), queue full (429), shutting down (503)."""
        ...

    def embed(self, ids: tuple[int, ...], adapter: str | None = None) -> Future[Floats]:
        """Queues a text for its embedding: the mean over its positions of the normed last hidden states, scaled to
        length 1, (D,) fp32. The same errors."""
        ...

    def abort(self, request_id: str) -> None:
        """The client went away: its slot is free before the next step. Does nothing when it is done or unknown."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Ends every open stream with finish_reason "abort"."""
        ...
