"""raymill: the engine with its tokenizer, requests submitted and read as the API does. `step_rate` is of the step alone, within it.

A step that carries drafts is no step of this table: its time counts, and so do the tokens that came of it, in `drafted`
alone. Ray is imported first, as it is in a replica, so that what the process holds beyond is the engine's.
"""

import asyncio
import itertools
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import timing
from timing import PREFILL, Prompts, Work, serve

_SLOTS = 32
_INTERVAL_S = 0.02
"""Between two writes of a stream, `stream_interval_ms` of a job."""


class Watch:
    """A step that remembers when it was called and for how many rows."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self.calls: list[tuple[float, float, list[int]]] = []
        """Begin, end, ids of each chunk."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, chunks: Sequence[Any], table: Any) -> Any:
        began = timing.now()
        output = self._step(chunks, table)
        self.calls.append((began, timing.now(), [len(chunk.ids) for chunk in chunks]))
        return output


def load(options: Namespace) -> Work:
    from raymill.inference.engine import BatchingEngine
    from raymill.inference.kv_cache import fit_pages
    from raymill.inference.loading import load_step
    from raymill.inference.requests import Request
    from raymill.inference.sampling import Sampling
    from raymill.model.files import read_model_config
    from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer

    config, _ = read_model_config(options.model)
    tokenizer = Tokenizer.load(options.model / "tokenizer.json")
    pages = options.pages or fit_pages(config, _SLOTS, 128 << 20, options.kv)
    watch = Watch(load_step(options.model, "auto", "cpu", pages, options.kv, options.threads))
    engine = BatchingEngine(
        watch,
        lambda: StreamDecoder(tokenizer),
        num_slots=_SLOTS,
        max_queued=0,
        max_step_tokens=_SLOTS + options.prefill_tokens,
    )
    prompts, numbers = Prompts(options), itertools.count()

    def work(name: str) -> dict[str, float]:
        asked = prompts.of(name)
        watch.calls.clear()
        began = timing.now()
        new_tokens = 1 if name == PREFILL else options.new_tokens
        requests = [Request(str(next(numbers)), tuple(ids), new_tokens, Sampling(temperature=0.0)) for ids in asked]
        streams = [engine.submit(request) for request in requests]
        asyncio.run(_read(streams))
        if name == PREFILL:
            first = watch.calls[0]
            return {
                "rate": len(asked[0]) / (timing.now() - began),
                "step_rate": len(asked[0]) / (first[1] - first[0]),
            }
        return decode_rates(watch.calls, len(asked))

    return work


async def _read(streams: Sequence[Any]) -> None:
    async def read(stream: Any) -> None:
        async for _ in stream.batches(_INTERVAL_S):
            pass

    await asyncio.gather(*map(read, streams))


def decode_rates(calls: list[tuple[float, float, list[int]]], sequences: int) -> dict[str, float]:
    """Over the gaps between one step of exactly these sequences, a token each, and the next such."""
    plain = [rows == [1] * sequences for _, _, rows in calls]
    pairs = [n for n in range(len(calls) - 1) if plain[n] and plain[n + 1]]
    between = sum(calls[n + 1][0] - calls[n][0] for n in pairs)
    within = sum(calls[n][1] - calls[n][0] for n in pairs)
    whole = sum(len(rows) == sequences and max(rows) <= 8 for _, _, rows in calls)
    return {
        "rate": sequences * len(pairs) / between,
        "step_rate": sequences * len(pairs) / within,
        "drafted": 1 - sum(plain) / whole,
    }


def _import_ray() -> None:
    import ray  # noqa: F401


if __name__ == "__main__":
    serve(load, _import_ray)
