"""The rows of the whole line: jsonl to packed token shards on two cores, start-up included, and the memory it holds.

Ours is `raymill run` of a job of prepare and tokenize, in a new run folder each time. One run of each side goes before
and does not count: what a machine compiles once is kept on disk. datatrove needs about half an hour for 300 MB, so it
gets two small samples; the straight line through them (its start-up and its rate) is drawn to the size that ours had.
Both use the same tokenizer.json. Growth: ours at several sizes; the slope between the smallest and the largest, and the
time of one key in the duplicate clustering, give the arithmetic for 1 TB.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.data.kernels import Bench
from benchmarks.data.rates import SIDES
from benchmarks.data.sides.timing import read_texts
from benchmarks.measure import Watched, say, spread, watch
from benchmarks.table import Row, columns, figure

CORES = 2
_QUICK_MB, _FULL_MB = (10.0, 30.0), (30.0, 100.0, 300.0)
_QUICK_SAMPLES_MB, _FULL_SAMPLES_MB = (1.0, 4.0), (2.0, 8.0)
_WARM_MB = 0.5
_LIMIT_S = 1800.0
_NODES, _NODE_CORES = 100, 16
_KEYS = 15
_SIGNATURE_WIDTH = 16


@dataclass(frozen=True)
class Run:
    """One size, one or more rounds."""

    megabytes: float
    """Text that went in, 10^6 bytes."""
    documents: int
    rounds: list[Watched]

    @property
    def wall_s(self) -> float:
        return statistics.median(each.wall_s for each in self.rounds)

    @property
    def cpu_s(self) -> float:
        return statistics.median(each.cpu_s for each in self.rounds)

    @property
    def peak_bytes(self) -> int:
        return max(each.peak_bytes for each in self.rounds)

    @property
    def speed(self) -> float:
        return self.megabytes / self.wall_s


def largest_mb(quick: bool) -> float:
    return (_QUICK_MB if quick else _FULL_MB)[-1]


def line(bench: Bench) -> tuple[list[Row], str]:
    """Speed, memory, growth, and what 1 TB would take."""
    sizes = _QUICK_MB if bench.quick else _FULL_MB
    samples = _QUICK_SAMPLES_MB if bench.quick else _FULL_SAMPLES_MB
    missing = bench.peers.missing.get("datatrove")
    ours: list[Run] = []
    theirs: list[Run] = []
    say("  one run of each that does not count")
    _ours(bench, _WARM_MB)
    if missing is None:
        _theirs(bench, _WARM_MB)
    for size in sizes[:-1]:
        ours.append(_ours(bench, size))
    for _ in range(bench.rounds):
        _extend(ours, _ours(bench, sizes[-1]))
        broken = _failure(ours)
        if broken is not None:
            return [Row("jsonl to packed shards, 2 cores", "MB/s", None, note=broken)], ""
        for sample in samples if missing is None else ():
            _extend(theirs, _theirs(bench, sample))
    failure = missing or _failure(theirs)
    last = ours[-1]
    reached = None if failure else reach(theirs, last.megabytes)
    note = f"{last.megabytes:.0f} MB of text in {last.wall_s:.1f} s ({last.cpu_s:.1f} CPU s)"
    if reached is not None:
        each = (f"{run.megabytes:.2g} MB in {run.wall_s:.0f} s ({run.cpu_s:.0f} CPU s)" for run in theirs)
        measured = ", ".join(each)
        note += f"; datatrove measured: {measured}; its figure is that line drawn to {last.megabytes:.0f} MB"
    if failure:
        note += f"; no figure of datatrove: {failure}"
    work = f"jsonl to packed shards, {CORES} cores, start-up included, {last.megabytes:.0f} MB"
    speeds = [last.megabytes / each.wall_s for each in last.rounds]
    peak = max(run.peak_bytes for run in ours)
    their_peak = None if failure else max(run.peak_bytes for run in theirs) / 1e9
    rows = [
        Row(work, "MB/s", last.speed, {"datatrove": reached}, spread(speeds), rounds=len(speeds), note=note),
        Row(
            "peak memory of the whole process tree",
            "GB",
            peak / 1e9,
            {"datatrove": their_peak},
            lower_is_better=True,
            note=f"the largest of {', '.join(f'{run.megabytes:.0f}' for run in ours)} MB; datatrove's at its samples",
        ),
    ]
    return rows, _growth(ours) + _terabyte(ours, bench.quick)


def _failure(runs: Sequence[Run]) -> str | None:
    return next((each.failure for run in runs for each in run.rounds if each.failure), None)


def _extend(runs: list[Run], one: Run) -> None:
    """Another round of a size that is there, or a new size."""
    for run in runs:
        if run.megabytes == one.megabytes:
            run.rounds.extend(one.rounds)
            return
    runs.append(one)


def _ours(bench: Bench, size_mb: float) -> Run:
    """`raymill run` on the first shards of the corpus."""
    folder = bench.work / f"corpus-{size_mb:g}"
    if not folder.exists():
        folder.mkdir()
        held = 0
        for shard in bench.shards:
            os.link(shard, folder / shard.name)
            held += shard.stat().st_size
            if held >= size_mb * 1e6:
                break
    texts = [len(text.encode()) for text in read_texts(sorted(folder.iterdir()), float("inf"))]
    storage, job, place = bench.work / "runs", bench.work / "line.yaml", bench.work / "place.yaml"
    job.write_text(yaml.safe_dump(job_settings(folder, bench.tokenizer)))
    place.write_text(yaml.safe_dump({"name": "benchmark", "provider": "local", "storage": str(storage)}))
    command = [sys.executable, "-m", "raymill.cli", "run", str(job), "--on", str(place)]
    found = watch(command, _cores(), {}, bench.work / "line.log", _LIMIT_S)
    shutil.rmtree(storage, ignore_errors=True)
    say(f"  raymill, {sum(texts) / 1e6:.0f} MB: {found.wall_s:.1f} s, {found.peak_bytes / 1e9:.2f} GB")
    return Run(sum(texts) / 1e6, len(texts), [found])


def job_settings(source: Path, tokenizer: Path) -> dict[str, object]:
    """The job that ours runs: datatrove's rules and near duplicates, then the given tokenizer."""
    rules = ["gopher_repetition", "gopher_quality", "c4_lines", "c4_page"]
    prepare = {
        "sources": [str(source)],
        "rules": rules,
        "min_sentences": 5,
        "require_terminal_punctuation": True,
        "drop_curly_brackets": True,
    }
    return {"name": "line", "prepare": prepare, "tokenize": {"tokenizer": str(tokenizer)}}


def _theirs(bench: Bench, sample_mb: float) -> Run:
    """datatrove on the first documents of the corpus, in two files."""
    folder = bench.work / f"sample-{sample_mb:g}"
    texts = read_texts(list(bench.shards), sample_mb)
    if not folder.exists():
        from benchmarks.data.corpus import to_row

        folder.mkdir()
        for part in range(CORES):
            rows = [to_row(f"d{number}", "sample", text) for number, text in enumerate(texts) if number % CORES == part]
            (folder / f"part-{part}.jsonl").write_bytes(b"".join(rows))
    goal = bench.work / "datatrove"
    script = str(SIDES / "line_datatrove.py")
    command = [str(bench.peers.python), script, str(folder), str(bench.tokenizer), str(goal)]
    found = watch(command, _cores(), {"TOKENIZERS_PARALLELISM": "false"}, bench.work / "datatrove.log", _LIMIT_S)
    shutil.rmtree(goal, ignore_errors=True)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    say(f"  datatrove, {megabytes:.2g} MB: {found.wall_s:.1f} s, {found.peak_bytes / 1e9:.2f} GB")
    return Run(megabytes, len(texts), [found])


def _cores() -> set[int]:
    return set(sorted(os.sched_getaffinity(0))[:CORES])


def reach(runs: Sequence[Run], megabytes: float) -> float:
    """MB/s at another size, on the straight line through the smallest and the largest run.

    On a busy machine wall time may grow too little between them; never less than its CPU time on all cores.
    """
    first, last = runs[0], runs[-1]
    more = last.megabytes - first.megabytes
    slope = max(last.wall_s - first.wall_s, (last.cpu_s - first.cpu_s) / CORES) / more
    return megabytes / (max(0.0, first.wall_s - slope * first.megabytes) + slope * megabytes)


def _growth(runs: Sequence[Run]) -> str:
    cells = [["text MB", "documents", "wall s", "MB/s", "CPU s", "peak GB"]]
    cells += [
        [
            f"{run.megabytes:.0f}",
            f"{run.documents:,}",
            f"{run.wall_s:.1f}",
            figure(run.speed),
            f"{run.cpu_s:.1f}",
            f"{run.peak_bytes / 1e9:.2f}",
        ]
        for run in runs
    ]
    return f"\ngrowth: raymill, {CORES} cores, start-up included\n" + columns(cells)


def _terabyte(runs: Sequence[Run], quick: bool) -> str:
    """1 TB on 100 nodes, from the slope of CPU seconds and the measured time of one key."""
    first, last = runs[0], runs[-1]
    slope = (last.cpu_s - first.cpu_s) / (last.megabytes - first.megabytes)
    cpu_s_per_mb = (
        slope if slope > 0 else last.cpu_s / last.megabytes
    )  # too much else ran between them: start-up and all
    documents = 1e6 * last.documents / last.megabytes
    key_s = cluster_key_s(200_000 if quick else 2_000_000)
    cpu_h = cpu_s_per_mb * 1e6 / 3600
    keys = documents * _KEYS
    cells = [
        ["1 TB on 100 nodes", "figure", "from"],
        ["documents", f"{documents / 1e6:,.0f} M", f"{1e6 * last.megabytes / last.documents:,.0f} bytes of text each"],
        [
            "work",
            f"{cpu_h:,.0f} CPU-hours",
            f"{cpu_s_per_mb * 1000:.0f} CPU-ms per MB, between {first.megabytes:.0f} and {last.megabytes:.0f} MB",
        ],
        ["", f"{60 * cpu_h / _NODES / _NODE_CORES:,.0f} minutes", f"on {_NODES} nodes of {_NODE_CORES} cores"],
        [
            "signatures moved",
            f"{documents * 8 * _SIGNATURE_WIDTH / 1e9:,.1f} GB",
            f"{8 * _SIGNATURE_WIDTH} bytes per document; no text moves",
        ],
        [
            "clustering",
            f"{keys * key_s / 60:,.0f} minutes",
            f"{key_s * 1e6:.2f} us per key, {_KEYS} keys per document, one process",
        ],
        ["clustering, memory", f"{documents * 5 / 1e9:,.2f} GB", "5 bytes per document, beside one range of keys"],
    ]
    return "\n\n" + columns(cells)


def cluster_key_s(documents: int) -> float:
    """Seconds per key of the duplicate clustering, on signatures of which one in ten has a partner."""
    from raymill.corpus.clusters import find_duplicates

    source = np.random.default_rng(1)
    keys = source.integers(1, 2**63, (_SIGNATURE_WIDTH, documents), np.uint64)
    copies = documents // 10
    keys[2:9, -copies:] = keys[2:9, :copies]
    find_duplicates([keys[:, :100]])
    began = time.process_time()
    find_duplicates([keys])
    return (time.process_time() - began) / (_KEYS * documents)
