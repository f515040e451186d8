"""The rows of the path through HTTP: what is left of the engine's tokens per second, and what the first token takes more.

The engine in process, the app under plain uvicorn and the endpoint on Ray Serve take turns on the same model. Clients,
server and engine share the cores; clients are coroutines of one process that read streams as they come. With `--threads 1`
rates are by CPU seconds of all of them together.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import flags, spread
from benchmarks.serving.bench import Bench
from benchmarks.serving.models import SMALL
from benchmarks.table import Row
from benchmarks.turns import Talk, failures, play

_ENGINE, _UVICORN, _SERVE = "the engine in process", "plain uvicorn", "Ray Serve"
_CLIENTS = (8, 32)
_FIRST = "first_ms"


def http(bench: Bench) -> list[Row]:
    rounds, model = 3 if bench.quick else 9, bench.model(SMALL).checkpoint("int8")
    variants = {_ENGINE: "engine", _UVICORN: "uvicorn", _SERVE: "serve"}
    firsts = 25 if bench.quick else 50
    sides = [
        bench.side(
            name,
            "http_raymill",
            *flags(model=model, folder=bench.work / word, variant=word, threads=bench.threads, firsts=firsts),
        )
        for name, word in variants.items()
    ]
    talks = play(sides, rounds, _told, environment=bench.environment)
    return [*(_share_row(talks, count, bench.unit) for count in _CLIENTS), _first_row(talks)]


def _share_row(talks: Mapping[str, Talk], clients: int, unit: str) -> Row:
    work = f"HTTP through Serve over the engine, {SMALL.name} int8, {clients} clients"
    if broken := failures(talks, {}):
        return Row(work, "%", None, note="; ".join(broken))
    rates = {name: [turn[str(clients)] for turn in talk.turns] for name, talk in talks.items()}
    shares = {
        name: [100 * one / other for one, other in zip(rates[name], rates[_ENGINE], strict=True)]
        for name in (_SERVE, _UVICORN)
    }
    medians = ", ".join(f"{name} {statistics.median(values):,.0f}" for name, values in rates.items())
    return Row(
        work,
        "%",
        statistics.median(shares[_SERVE]),
        spread=spread(shares[_SERVE]),
        rounds=len(shares[_SERVE]),
        note=f"plain uvicorn {statistics.median(shares[_UVICORN]):.0f} %; {unit}: {medians}",
    )


def _first_row(talks: Mapping[str, Talk]) -> Row:
    work = f"first token through Serve beyond the engine's, {SMALL.name} int8, idle, p50"
    if broken := failures(talks, {}):
        return Row(work, "ms", None, lower_is_better=True, note="; ".join(broken))
    firsts = {name: [turn[_FIRST] for turn in talk.turns] for name, talk in talks.items()}
    more = [one - other for one, other in zip(firsts[_SERVE], firsts[_ENGINE], strict=True)]
    medians = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in firsts.items())
    return Row(
        work,
        "ms",
        statistics.median(more),
        spread=spread(more),
        lower_is_better=True,
        rounds=len(more),
        note=f"p50 of each, ms: {medians}",
    )


def _told(turn: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{turn[str(count)]:,.0f}" for count in _CLIENTS)
    return f"{rates} tokens/s at {' and '.join(map(str, _CLIENTS))} clients, first token {turn[_FIRST]:.1f} ms"
