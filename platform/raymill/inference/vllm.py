"""The same requests handed to vLLM: for a GPU, or a model that vLLM runs better than we do.

In: a folder that `raymill export` wrote as compressed-tensors (or a checkpoint without quantization). Out: an `Engine`. vLLM is
no dependency of ours: it is imported when an engine is loaded, and MachineError says how to get it.

vLLM batches, caches and samples; ids become text here, by the same code as in our own engine, so stop strings and
characters spread over ids come out alike. Not offered: output that conforms to a schema and embeddings (RequestError says so).

Never run against vLLM itself, which cannot be installed where this is developed: written from the documentation of
AsyncLLMEngine, SamplingParams and LoRARequest (v0.10 to v0.19), tested against a fake of that shape. Unproved above all:
that its draws repeat with the batch (vLLM does not promise it), and what its log probabilities of a prompt cost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.errors import ArtifactError, MachineError, RequestError
from raymill.inference.limits import check_adapter, check_request
from raymill.inference.requests import EngineStats, Request, TokenEvent
from raymill.inference.sampling import TokenLogprob
from raymill.inference.step import Floats
from raymill.inference.stream import Stream
from raymill.inference.text import TextStream
from raymill.model.files import read_config, read_model_config
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks vLLM can be told to make room for."""
_log = logging.getLogger(__name__)


class VllmEngine:
    """`Engine` over vLLM's asynchronous engine, on an event loop in a thread of its own."""

    def __init__(
        self,
        inner: Any,
        tokenizer: Tokenizer,
        max_seq_len: int,
        vocab_size: int,
        *,
        max_slots: int,
        max_queued: int,
        adapters: Mapping[str, Any],
    ) -> None:
        """inner: an AsyncLLMEngine. adapters: LoRARequest by name."""
        self._inner, self._tokenizer = inner, tokenizer
        self._max_seq_len, self._vocab_size = max_seq_len, vocab_size
        self._max_slots, self._max_queued = max_slots, max_queued
        self._adapters = dict(adapters)
        self._open: dict[str, Future[TokenEvent]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._loop: AbstractEventLoop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Tokenizer, *, max_slots: int, max_queued: int, adapters: Mapping[str, Path]
    ) -> VllmEngine:
        """MachineError without vLLM, ArtifactError for a checkpoint that it cannot read."""
        if "quantization" in read_config(folder):
            raise ArtifactError(
                f"vLLM does not read the quantized checkpoint {folder}",
                why="its matrices are stored for our own engine",
                fix="write it for vLLM with raymill export --format compressed-tensors, and serve that folder",
            )
        config, vocab_size = read_model_config(folder)
        try:
            from vllm import AsyncEngineArgs, AsyncLLMEngine
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise MachineError(
                "vLLM is not installed",
                why=str(error),
                fix="pip install vllm on the serving nodes, or set serve.engine to auto",
            ) from None
        args = AsyncEngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=config.max_seq_len,
            max_num_seqs=max_slots,
            enable_prefix_caching=True,
            enable_lora=bool(adapters),
            max_lora_rank=_room_for(adapters),
        )
        loras = {name: LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(adapters.items(), start=1)}
        inner = AsyncLLMEngine.from_engine_args(args)
        limits = {"max_slots": max_slots, "max_queued": max_queued}
        return cls(inner, tokenizer, config.max_seq_len, vocab_size, **limits, adapters=loras)

    @property
    def max_seq_len(self) -> int:
        """Prompt and completion together may have this many tokens."""
        return self._max_seq_len

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """LoRA adapters that requests may name."""
        return tuple(self._adapters)

    def submit(self, request: Request) -> Stream:
        """Hands a request to vLLM and returns the stream of its events."""
        check_request(request, self.max_seq_len, self.vocab_size)
        check_adapter(request.adapter, self._adapters)
        if request.grammar is not None:
            raise RequestError(
                "this endpoint's engine, vllm, takes no schema",
                field="response_format",
                fix="leave response_format out",
            )
        stream = Stream()
        with self._lock:
            if self._closed:
                raise RequestError("this replica is shutting down", status=503, fix="send the request again")
            if len(self._open) >= self._max_slots + self._max_queued:
                raise RequestError(
                    f"{self._max_slots} requests are running and {self._max_queued} wait",
                    status=429,
                    fix="wait for the Retry-After seconds, then send the request again",
                )
            assert request.id not in self._open, "request ids are unique"
            answer = asyncio.run_coroutine_threadsafe(self._answer(request, stream), self._loop)
            self._open[request.id] = answer
        answer.add_done_callback(lambda done: self._end(request.id, stream, done))
        return stream

    def embed(self, ids: tuple[int, ...], adapter: str | None = None) -> Future[Floats]:
        raise RequestError("this endpoint's engine, vllm, makes no embeddings", fix="set serve.engine to auto")

    def abort(self, request_id: str) -> None:
        """Drops a request. Does nothing when it is done or unknown."""
        with self._lock:
            running = self._open.get(request_id)
        if running is not None:
            running.cancel()

    def stats(self) -> EngineStats:
        with self._lock:
            count, closed = len(self._open), self._closed
        active = min(count, self._max_slots)
        healthy = not closed and not self._inner.errored
        return EngineStats(count - active, active, self._max_slots, healthy)

    def close(self) -> None:
        """Ends every open stream with finish_reason "abort"."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running = list(self._open.values())
        for each in running:
            each.cancel()
        asyncio.run_coroutine_threadsafe(_all_done(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._inner.shutdown()

    def _end(self, request_id: str, stream: Stream, done: Future[TokenEvent]) -> None:
        """Puts the last event; a request may be cancelled before its coroutine took a step."""
        with self._lock:
            self._open.pop(request_id, None)
        stream.put(TokenEvent("", "abort", counts=False) if done.cancelled() else done.result())

    async def _answer(self, request: Request, stream: Stream) -> TokenEvent:
        """One request from vLLM to its stream; its last event."""
        try:
            return await self._read(request, stream)
        except Exception:  # whatever vLLM raises must reach the client
            _log.exception("vLLM failed on a request")
            return TokenEvent("", "error", counts=False)

    async def _read(self, request: Request, stream: Stream) -> TokenEvent:
        """Puts every event but the last, which it gives back. Leaving the loop has vLLM drop the request."""
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        lora = self._adapters.get(request.adapter or "")
        outputs = self._inner.generate(prompt, sampling_params(request), request.id, lora_request=lora)
        text, made, held, scores = TextStream(StreamDecoder(self._tokenizer), request.stop), 0, None, None
        try:
            async for output in outputs:
                if request.prompt_logprobs is not None and scores is None and output.prompt_logprobs is not None:
                    scores = _prompt_scores(request, output.prompt_logprobs)
                    if request.max_tokens == 0:
                        return TokenEvent("", "length", prompt=scores, counts=False)
                part = output.outputs[0]
                for n, token in enumerate(part.token_ids):
                    if held is not None:
                        stream.put(held)
                    made += 1
                    logprob = None
                    if request.logprobs is not None:
                        logprob = _token_logprob(token, part.logprobs[n], request.logprobs)
                    held = _event(request, text, token, logprob, made, scores if made == 1 else None)
                    if held.finish_reason is not None:
                        return held
        finally:
            await outputs.aclose()
        raise RuntimeError("vLLM ended a completion early")


def sampling_params(request: Request) -> Any:
    """Our settings in vLLM's words. Text is made here, so vLLM sees neither stop strings nor an end of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed % 2**63,
        max_tokens=max(1, request.max_tokens),
        stop_token_ids=sorted(request.stop_ids),
        ignore_eos=True,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _event(
    request: Request,
    text: TextStream,
    token: int,
    logprob: TokenLogprob | None,
    made: int,
    scores: tuple[TokenLogprob, ...] | None,
) -> TokenEvent:
    if token in request.stop_ids:
        return TokenEvent(text.finish(), "stop", logprob, scores)
    shown = text.push(token)
    if text.stopped:
        return TokenEvent(shown, "stop", logprob, scores)
    if made == request.max_tokens:
        shown += text.finish()
        return TokenEvent(shown, "stop" if text.stopped else "length", logprob, scores)
    return TokenEvent(shown, None, logprob, scores)


def _token_logprob(token: int, found: Mapping[int, Any], top: int) -> TokenLogprob:
    """vLLM gives the token and the likeliest ones, in any order."""
    ranked = sorted(
        ((index, float(each.logprob)) for index, each in found.items()), key=lambda pair: (-pair[1], pair[0])
    )
    return TokenLogprob(token, float(found[token].logprob), tuple(ranked[:top]))


def _prompt_scores(request: Request, found: list[Mapping[int, Any] | None]) -> tuple[TokenLogprob, ...]:
    first, *others = request.prompt_ids
    top = request.prompt_logprobs or 0
    scored = (_token_logprob(token, each or {}, top) for token, each in zip(others, found[1:], strict=True))
    return (TokenLogprob(first, None), *scored)


def _room_for(adapters: Mapping[str, Path]) -> int:
    from raymill.inference.adapters import read_rank

    most = max((read_rank(folder) for folder in adapters.values()), default=_MAX_RANKS[0])
    fitting = [rank for rank in _MAX_RANKS if rank >= most]
    if not fitting:
        raise ArtifactError(
            f"an adapter has rank {most}", why=f"vLLM takes {_MAX_RANKS[-1]} at most", fix="set serve.engine to auto"
        )
    return fitting[0]


async def _all_done() -> None:
    """Waits for every task of this loop but itself."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)
