"""The row of saving: how long training stands still for a checkpoint of 170 MB, weights and AdamW's state.

Each turn is one checkpoint with nothing beside it; the next begins when it is on disk. `async_save` runs twice, as it comes
and with the stager that keeps its memory, as ours does.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.measure import flags
from benchmarks.table import OURS, Row
from benchmarks.training.bench import Bench
from benchmarks.training.steps import DIM, LAYERS
from benchmarks.turns import failures


def save(bench: Bench) -> list[Row]:
    options = flags(tokens=bench.tokens, folder=bench.work, layers=LAYERS, dim=DIM)
    peers = {"torch.save": "save", "async_save": "async", "async_save, memory kept": "kept"}
    sides = [bench.side(OURS, "save_raymill", *options)]
    sides += [bench.side(name, "save_torch", *options, "--variant", variant) for name, variant in peers.items()]
    talks = bench.play(sides, 5 if bench.quick else 15, "ms", _stall_ms)
    values = {name: talk.median(_stall_ms) for name, talk in talks.items()}
    works = {name: talk.median(lambda turn: 1e3 * turn["thread_cpu_s"]) for name, talk in talks.items()}
    ends = {name: talk.median(lambda turn: turn["until_saved_s"]) for name, talk in talks.items()}
    cpus = {name: talk.median(lambda turn: turn["cpu_s"]) for name, talk in talks.items()}
    notes = [
        "of it CPU of the loop's thread, ms: " + _list(works),
        "seconds until it was saved: " + _list(ends),
        "CPU-s of the whole process: " + _list(cpus),
        "ours is hashed and on disk (fsync) then, the others handed to the system",
        *failures(talks, {}),
    ]
    size = talks[OURS].facts.get("state_bytes", 0)
    return [
        Row(
            f"stall per checkpoint of {size / 1e6:.0f} MB",
            "ms",
            values.pop(OURS),
            values,
            talks[OURS].spread(_stall_ms),
            lower_is_better=True,
            rounds=len(talks[OURS].turns),
            note="; ".join(notes),
        )
    ]


def _stall_ms(turn: Mapping[str, float]) -> float:
    return 1e3 * turn["stall_s"]


def _list(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items() if value is not None)
