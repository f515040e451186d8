"""The rows of a process: the memory it holds beyond a bare one, and the time from its start to its first token.

A bare process is Python, and for ours Python with ray imported, which a replica's worker has done before it knows of a
model. What is left is the engine's: libraries, weights, KV cache, buffers. Resident pages count, files that are mapped too.
"""

from __future__ import annotations

import dataclasses

from benchmarks.measure import Side, flags, take_turns
from benchmarks.serving.bench import Bench
from benchmarks.serving.engines import INT4, engine_sides
from benchmarks.serving.models import LARGE
from benchmarks.table import OURS, Row
from benchmarks.turns import Talk, failures, play

_SEQUENCES, _PROMPT_TOKENS, _NEW_TOKENS = 32, 64, 48
_PAGES = _SEQUENCES * 4
"""Of 32 positions: as many as the sequences need."""
_FULL = f"{OURS}, fp32 keys and values"
_RAY, _PYTHON = "import ray", "Python"


def memory(bench: Bench) -> list[Row]:
    """Held after 32 sequences at once, twice; what was held before the first stands in the note.

    Prompts are fed in the product's chunks of 64 tokens, by llama.cpp in its default's 512: ours held 12 MB more in those.
    """
    options = flags(works=_SEQUENCES, prompt_tokens=_PROMPT_TOKENS, new_tokens=_NEW_TOKENS, prefill_tokens=64)
    sides, missing = engine_sides(bench, LARGE, *options)
    ours = next(side for side in sides if side.name == OURS)
    pages = flags(pages=_PAGES)
    compact = dataclasses.replace(ours, options=[*ours.options, *pages, *flags(kv="int8")])
    full = dataclasses.replace(ours, name=_FULL, options=[*ours.options, *pages])
    peers = [side for side in sides if side.name not in (OURS, INT4)]
    talks = play([compact, full, *peers], 1, lambda turn: "done", 420.0, bench.environment)
    held = {name: _beyond(talk, "held_bytes") for name, talk in talks.items()}
    values = dict(held)
    whole = values.pop(_FULL)
    loaded = ", ".join(f"{name} {_shown(_beyond(talk, 'loaded_bytes'))}" for name, talk in talks.items())
    peak = ", ".join(f"{name} {_shown(_beyond(talk, 'peak_bytes'))}" for name, talk in talks.items())
    notes = [
        f"int8 keys and values; with fp32 ones {_shown(whole)}",
        f"loaded, before the first: {loaded}",
        f"highest: {peak}",
        *failures(talks, missing),
    ]
    work = f"memory of a {LARGE.name} int8 process, {_SEQUENCES} sequences"
    return [
        Row(
            work,
            "MB",
            values.pop(OURS),
            values | dict.fromkeys(missing),
            lower_is_better=True,
            note="; ".join(notes),
        )
    ]


def start(bench: Bench) -> list[Row]:
    """Fresh processes in turns, files in the system's cache; a bare one's time is taken off."""
    sides, missing = engine_sides(bench, LARGE, *flags(works="prefill", prefill_tokens=8), "--start")
    sides = [side for side in sides if side.name != INT4]
    ray = bench.side(_RAY, "bare", "--ray")
    python = Side(_PYTHON, ray.script, bench.peers.python)
    rounds = 3 if bench.quick else 5
    take_turns(sides[:1], 1, lambda turn: "compiled", 300.0, bench.environment)  # as it is on a node that has served
    found = take_turns([ray, python, *sides], rounds, lambda turn: f"{turn['start_s']:.2f} s", 300.0, bench.environment)
    took = {name: outcomes.median(lambda turn: turn["start_s"]) for name, outcomes in found.items()}
    bare_ray, bare_python = took.pop(_RAY), took.pop(_PYTHON)
    assert bare_ray is not None and bare_python is not None
    values = {
        name: None if whole is None else whole - (bare_ray if name == OURS else bare_python)
        for name, whole in took.items()
    }
    broken = [f"no figure of {n}: {o.failure}" for n, o in found.items() if o.failure is not None]
    notes = [
        f"bare processes: {_RAY} {bare_ray:.2f} s, {_PYTHON} {bare_python:.2f} s",
        *broken,
        *(f"no figure of {name}: {why}" for name, why in missing.items()),
    ]
    return [
        Row(
            f"start of a {LARGE.name} int8 process to its first token, beyond a bare one",
            "s",
            values.pop(OURS),
            values | dict.fromkeys(missing),
            lower_is_better=True,
            rounds=rounds,
            note="; ".join(notes),
        )
    ]


def _beyond(talk: Talk, name: str) -> float | None:
    """MB."""
    return None if talk.failure is not None else (talk.facts[name] - talk.facts["bare_bytes"]) / 1e6


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f}"
