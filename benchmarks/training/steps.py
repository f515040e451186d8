"""The rows of one step on one thread: tokens per CPU second in fp32 and with int8 matrices, and peak memory.

All models have the same shape (heads of 64, hidden width 4 or, gated, 8/3 of the model's, tied head); their parameters and
operations per token are counted alike and must lie within 5 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.measure import Side, flags
from benchmarks.table import OURS, Row
from benchmarks.training.bench import Bench
from benchmarks.training.tokens import SEQ_LEN, VOCAB_SIZE
from benchmarks.turns import Talk, failures

LAYERS, DIM, BATCH_SIZE = 6, 384, 8
WIDE = 768
_TOKENS = BATCH_SIZE * SEQ_LEN
_NEAR = 0.05
_LOSS_NEAR = 0.005
_INT8, _MASKED, _TRAINER, _INNER = "raymill int8", "raymill, documents masked", "transformers Trainer", "transformers"


def step(bench: Bench) -> list[Row]:
    """Speed at 384 wide, and what each process held at most."""
    masked = bench.side(_MASKED, "step_raymill", *_shape(bench, DIM), "--variant", "documents")
    sides = [_ours(bench, DIM), *_peers(bench, DIM), masked]
    talks = _play(bench, sides, 3 if bench.quick else 9)
    missing = bench.missing("transformers", "litgpt")
    notes = [_sizes(talks), *failures(talks, missing)]
    if (with_mask := talks.pop(_MASKED)).failure is None:
        notes.insert(0, f"ours with attention kept inside documents: {with_mask.median(_speed):,.0f}")
    work = f"step, {LAYERS} layers, {DIM} wide, fp32"
    return [_speed_row(work, talks, missing, notes), _memory_row(talks, missing)]


def int8(bench: Bench) -> list[Row]:
    """Speed and loss at 768 wide, int8 matrices against fp32."""
    options = _shape(bench, WIDE)
    sides = [
        bench.side(_INT8, "step_raymill", *options, "--variant", "int8"),
        _ours(bench, WIDE),
        bench.side("nanoGPT", "step_nanogpt", *options),
    ]
    if not bench.quick:
        sides = [*sides[:2], *_peers(bench, WIDE)]
    talks = _play(bench, sides, 2 if bench.quick else 6)
    missing = {} if bench.quick else bench.missing("transformers", "litgpt")
    ours = talks[_INT8]
    peers = {"raymill fp32" if name == OURS else name: talk for name, talk in talks.items() if name != _INT8}
    notes = [_sizes(talks), *failures(talks, missing)]
    if bench.quick:
        notes.append("the other peers are left to the whole run")
    work = f"step, {LAYERS} layers, {WIDE} wide, int8"
    return [_speed_row(work, {OURS: ours} | peers, missing, notes), _loss_row(bench)]


def _loss_row(bench: Bench) -> Row:
    """How far apart the losses of both are after the same steps, on fewer layers, so that there can be many steps."""
    batch_size, rounds = (1, 40) if bench.quick else (4, 300)
    options = [*_shape(bench, WIDE), *flags(layers=2, batch_size=batch_size)]
    sides = [
        bench.side(_INT8, "step_raymill", *options, "--variant", "int8"),
        bench.side(OURS, "step_raymill", *options),
    ]
    talks = bench.play(sides, rounds, "nats", lambda turn: turn["loss"])
    work = f"loss after {rounds} steps, int8 over fp32"
    if broken := failures(talks, {}):
        return Row(work, "%", None, note="; ".join(broken))
    ends = [statistics.fmean(turn["loss"] for turn in talks[name].turns[-rounds // 5 :]) for name in (_INT8, OURS)]
    apart = ends[0] / ends[1] - 1
    verdict = "within" if abs(apart) <= _LOSS_NEAR else "NOT within"
    first = talks[OURS].facts["warm"][0]["loss"]
    note = (
        f"{verdict} {_LOSS_NEAR:.1%}: {first:.3f} at the start, then {ends[0]:.4f} and {ends[1]:.4f}, mean of the last "
    )
    note += f"{rounds // 5} steps; 2 layers, {WIDE} wide, {batch_size} x {SEQ_LEN} tokens a step"
    return Row(work, "%", 100 * apart, note=note)


def _shape(bench: Bench, dim: int) -> list[str]:
    read = flags(ids=bench.rows, tokens=bench.tokens, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=BATCH_SIZE)
    return [*read, *flags(folder=bench.work, layers=LAYERS, dim=dim)]


def _ours(bench: Bench, dim: int) -> Side:
    return bench.side(OURS, "step_raymill", *_shape(bench, dim))


def _peers(bench: Bench, dim: int) -> list[Side]:
    options = _shape(bench, dim)
    sides = [bench.side("nanoGPT", "step_nanogpt", *options)]
    if "transformers" not in bench.peers.missing:
        sides.append(bench.side(_TRAINER, "step_transformers", *options, peer="transformers"))
        sides.append(bench.side(_INNER, "step_transformers", *options, "--variant", "inner", peer="transformers"))
    if "litgpt" not in bench.peers.missing:
        sides.append(bench.side("litgpt", "step_litgpt", *options, peer="litgpt"))
    return sides


def _play(bench: Bench, sides: list[Side], rounds: int) -> dict[str, Talk]:
    return bench.play(sides, rounds, "tokens per CPU second", _speed)


def _speed(turn: Mapping[str, float]) -> float:
    return _TOKENS / turn["cpu_s"]


def _speed_row(work: str, talks: Mapping[str, Talk], missing: Mapping[str, str], notes: list[str]) -> Row:
    values = {name: talk.median(_speed) for name, talk in talks.items()}
    ours = talks[OURS]
    return Row(
        work,
        "tokens/CPU-s",
        values.pop(OURS),
        values | dict.fromkeys(missing),
        ours.spread(_speed),
        rounds=len(ours.turns),
        note="; ".join(notes),
    )


def _memory_row(talks: Mapping[str, Talk], missing: Mapping[str, str]) -> Row:
    """VmHWM after at least 4 steps, imports and all; what a process held before its first step stands in the note."""
    values = {name: None if talk.failure else talk.facts["peak_bytes"] / 1e6 for name, talk in talks.items()}
    before = ", ".join(f"{name} {t.facts['loaded_bytes'] / 1e6:.0f}" for name, t in talks.items() if not t.failure)
    return Row(
        f"peak memory, {LAYERS} layers, {DIM} wide, batch {BATCH_SIZE}",
        "MB",
        values.pop(OURS),
        values | dict.fromkeys(missing),
        lower_is_better=True,
        note=f"of it before the first step (libraries, weights, tokens): {before}",
    )


def _sizes(talks: Mapping[str, Talk]) -> str:
    """Parameters and operations of all sides, and whether they are comparable."""
    known = {name: talk.facts for name, talk in talks.items() if "parameters" in talk.facts}
    parts = [f"{n} {f['parameters'] / 1e6:.2f} M, {f['flops_per_token'] / 1e6:.1f}" for n, f in known.items()]
    apart = max(
        (max(f[key] for f in known.values()) / min(f[key] for f in known.values()) - 1 if known else 0.0)
        for key in ("parameters", "flops_per_token")
    )
    verdict = f"within {apart:.1%}" if apart <= _NEAR else f"NOT COMPARABLE: {apart:.0%} apart"
    return f"parameters and MFLOP per token, {verdict}: " + "; ".join(parts)
