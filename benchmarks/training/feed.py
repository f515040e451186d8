"""The row of feeding: microseconds of CPU per batch of 8 x 256, ids in memory as they are after the first epoch."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.measure import flags
from benchmarks.table import OURS, Row
from benchmarks.training.bench import Bench
from benchmarks.training.sides.timing import FEEDS
from benchmarks.training.tokens import SEQ_LEN
from benchmarks.turns import failures

_BATCH_SIZE = 8
_PACKED = "raymill, documents packed whole"


def feed(bench: Bench) -> list[Row]:
    options = flags(tokens=bench.tokens, seq_len=SEQ_LEN, batch_size=_BATCH_SIZE)
    sides = [
        bench.side(OURS, "feed_raymill", *options),
        bench.side("nanoGPT", "feed_nanogpt", *options),
        bench.side("torch DataLoader", "feed_torch", *options),
        bench.side(_PACKED, "feed_raymill", *options, "--variant", "best_fit"),
    ]
    talks = bench.play(sides, 5 if bench.quick else 15, "us", _us)
    packed = talks.pop(_PACKED)
    values = {name: talk.median(_us) for name, talk in talks.items()}
    notes = ["ours makes document numbers too, the peers none", *failures(talks, {})]
    if packed.failure is None:
        notes.append(f"ours with documents packed whole: {packed.median(_us):.0f}")
    return [
        Row(
            f"feeding a batch of {_BATCH_SIZE} x {SEQ_LEN}",
            "us",
            values.pop(OURS),
            values,
            talks[OURS].spread(_us),
            lower_is_better=True,
            rounds=len(talks[OURS].turns),
            note="; ".join(notes),
        )
    ]


def _us(turn: Mapping[str, float]) -> float:
    return turn["cpu_s"] / FEEDS * 1e6
