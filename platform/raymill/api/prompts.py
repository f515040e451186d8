"""A parsed request and its encoded prompts to what the engine is asked for: n completions of each, prompt by prompt.

A choice's draws depend on the request's seed and its number among its prompt's choices alone, so a prompt is continued as it
would be in a request of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from raymill.api.chat_requests import ChatRequest
from raymill.api.choices import ChatChoice, TextChoice
from raymill.api.completion import Asked
from raymill.api.completion_requests import CompletionRequest
from raymill.api.context import completion_length
from raymill.api.logprobs import CompletionLogprobs, TokenNames
from raymill.api.schema import Generation
from raymill.errors import RequestError
from raymill.inference.grammar import Grammar
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling

_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Model:
    """What a request's model name stands for, and its bounds."""

    adapter: str | None
    max_seq_len: int
    vocab_size: int
    names: TokenNames


def ask_completions(
    completion_id: str,
    asked: CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
    model: Model,
    stop_ids: frozenset[int],
) -> list[Asked]:
    """The choices of /v1/completions."""
    samplings = _samplings(asked, model)
    scores = asked.logprobs if asked.echo else None
    if scores is None and asked.max_tokens == 0:
        scores = 0  # the engine makes no token only where it scores the prompt
    choices = []
    for place, (text, ids) in enumerate(zip(asked.prompt, prompts, strict=True)):
        length = completion_length(
            len(ids),
            asked.max_tokens,
            _DEFAULT_MAX_TOKENS,
            model.max_seq_len,
            field="prompt",
            length_field="max_tokens",
        )
        for number, sampling in enumerate(samplings):
            index = place * len(samplings) + number
            request = Request(
                id=f"{completion_id}-{index}",
                prompt_ids=ids,
                max_tokens=length,
                sampling=sampling,
                stop=tuple(asked.stop or ()),
                stop_ids=stop_ids,
                logprobs=asked.logprobs,
                prompt_logprobs=scores,
                adapter=model.adapter,
            )
            echo = None
            if asked.echo:
                echo = text if isinstance(text, str) else model.names.tokenizer.decode(ids)
            logprobs = None if asked.logprobs is None else CompletionLogprobs(model.names)
            choices.append(Asked(request, TextChoice(index, echo, logprobs)))
    return choices


def ask_chat(
    completion_id: str,
    asked: ChatRequest,
    ids: tuple[int, ...],
    model: Model,
    stop_ids: frozenset[int],
    grammar: Grammar | None,
) -> list[Asked]:
    """The choices of /v1/chat/completions."""
    for field, length in (("max_completion_tokens", asked.max_completion_tokens), ("max_tokens", asked.max_tokens)):
        if length is not None and length >= model.max_seq_len:
            fix = f"set it to at most {model.max_seq_len - 1}, less the prompt's tokens"
            raise RequestError(f"{field} is {length}", field=field, fix=fix)
    wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    length = completion_length(
        len(ids),
        wanted,
        model.max_seq_len,
        model.max_seq_len,
        field="messages",
        length_field=asked.length_field,
    )
    choices = []
    for index, sampling in enumerate(_samplings(asked, model)):
        request = Request(
            id=f"{completion_id}-{index}",
            prompt_ids=ids,
            max_tokens=length,
            sampling=sampling,
            stop=tuple(asked.stop or ()),
            stop_ids=stop_ids,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            grammar=grammar,
            adapter=model.adapter,
        )
        choices.append(Asked(request, ChatChoice(index, model.names if asked.logprobs else None)))
    return choices


def _samplings(asked: Generation, model: Model) -> list[Sampling]:
    """How the tokens of a prompt's n choices are drawn."""
    biases = tuple((int(token), bias) for token, bias in (asked.logit_bias or {}).items())
    wrong = next((token for token, _ in biases if token >= model.vocab_size), None)
    if wrong is not None:
        what = f"logit_bias names the token {wrong}"
        raise RequestError(what, field="logit_bias", fix=f"name ids from 0 to {model.vocab_size - 1}")
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    return [
        Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            logit_bias=biases,
            seed=seed + (number << 64),  # past any seed a request can name: choices never share draws
        )
        for number in range(asked.n or 1)
    ]
