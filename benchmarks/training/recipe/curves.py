"""`python -m benchmarks.training.recipe.curves`: the small preset's whole course beside the tuned reference's.

    python -m benchmarks.training.recipe.curves                  both, one after the other: an hour on one calm core
    python -m benchmarks.training.recipe.curves --sides nanogpt  one of them; the other's last run stays
    python -m benchmarks.training.recipe.curves --sides          none: table and page of the runs that are there

Each side runs once, whole, in a process of its own on one core with one thread; one that is killed goes on from its last
validation (167 MB are kept for that until its end) when it is asked for again with the same settings. How far ours is
when it first is at the reference's last loss, both by the same 64 sequences of the val split, is read off the line
between two validations.
A recipe whose rate falls at the end only is judged hard by that: a shorter run of it would be there earlier.

Out: `curves_small.json` (every point, the settings) and `curves_small.html` (a page that needs no network) in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ONE_THREAD, error_line, say
from benchmarks.table import OURS
from benchmarks.training.recipe import race, settings

SIZE = "small"
SIDES = {"nanogpt": race.REFERENCE, "raymill": OURS}
_POINTS_SHOWN = 8
_COLORS = {race.REFERENCE: "#c2703d", OURS: "#4a7fb5"}

Run = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    folder = options.cache / "race"
    shards = race.make_shards(folder, SIZE)
    file = folder / f"curves_{SIZE}.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))["runs"] if file.exists() else {}
    for side in options.sides:
        say(f"{SIDES[side]} ...")
        kept = folder / f"curves_{SIZE}_{side}.pt"
        asked = ["--size", SIZE, "--seed", str(options.seed), "--kept", str(kept)]
        runs[SIDES[side]] = launch(side, shards, options.core, asked)
        file.write_text(json.dumps({"settings": _settings(), "runs": runs}, indent=1) + "\n", "utf-8")
        kept.unlink()
    if len(runs) == len(SIDES):
        draw(runs, folder / f"curves_{SIZE}.html")
        print(table(runs))
    return 0


def launch(side: str, shards: Path, core: int, options: Sequence[str]) -> dict[str, Any]:
    """One run of a side in a process of its own, whose validations are told as they come. RuntimeError if it fails."""
    command = [sys.executable, str(Path(__file__).with_name("side.py")), "--side", side, "--shards", str(shards)]
    surroundings = {**os.environ, **ONE_THREAD, **race.import_path()}
    command += ["--core", str(core), *options]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        told = []
        for line in run.stderr:
            told.append(line)
            say(line.rstrip())
        result = run.stdout.read()
    if run.returncode != 0:
        raise RuntimeError(f"{SIDES[side]} failed: {error_line(''.join(told))}")
    found: dict[str, Any] = json.loads(result.strip().splitlines()[-1])
    return found


def reach(curve: Sequence[Run], loss: float) -> tuple[float, float] | None:
    """Tokens and CPU-seconds at which a curve is at `loss` for the first time; None where it never is."""
    before = None
    for point in curve:
        if point["val_loss"] <= loss:
            if before is None:
                return point["tokens"], point["cpu_s"]
            share = (before["val_loss"] - loss) / (before["val_loss"] - point["val_loss"])
            tokens, cpu_s = (before[name] + share * (point[name] - before[name]) for name in ("tokens", "cpu_s"))
            return tokens, cpu_s
        before = point
    return None


def table(runs: Mapping[str, Run]) -> str:
    """Both courses by tokens, and how far ours was at the reference's last loss."""
    lines = []
    for name, run in runs.items():
        at = f"{run['steps']:,} steps, {run['tokens']:,} tokens, {run['cpu_s']:.0f} CPU-s: {run['val_loss']:.4f} nats"
        lines.append(f"{name}: {run['parameters']:,} parameters, {at} over the whole val split")
    lines += ["", f"{'tokens':>12}" + "".join(f"{name + ' CPU-s':>16}{'loss':>9}" for name in runs)]
    for tokens in _shown(next(iter(runs.values()))["curve"]):
        lines.append(f"{tokens:>12,}" + "".join(_cell(run["curve"], tokens) for run in runs.values()))
    theirs = runs[race.REFERENCE]
    target = theirs["curve"][-1]["val_loss"]
    reached = reach(runs[OURS]["curve"], target)
    if reached is None:
        return "\n".join([*lines, "", f"ours never is at the reference's last loss, {target:.4f}"])
    at_tokens, at_cpu_s = reached
    ratios = f"ratios {theirs['tokens'] / at_tokens:.2f} and {theirs['cpu_s'] / at_cpu_s:.2f}"
    after = f"{at_tokens:,.0f} tokens, {at_cpu_s:.0f} CPU-s"
    told = f"ours is at the reference's last loss, {target:.4f}, after {after}: {ratios}"
    return "\n".join([*lines, "", told])


def draw(runs: Mapping[str, Run], file: Path) -> None:
    """The page: loss by tokens and by CPU-seconds."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, (along, unit) in enumerate((("tokens", "tokens"), ("cpu_s", "CPU-seconds")), 1):
        for name, run in runs.items():
            xs, ys = ([point[key] for point in run["curve"]] for key in (along, "val_loss"))
            style = {"color": _COLORS[name], "width": 1.5}
            line = go.Scatter(x=xs, y=ys, name=name, mode="lines+markers", line=style, showlegend=column == 1)
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(title_text=unit, row=1, col=column)
    target = runs[race.REFERENCE]["curve"][-1]["val_loss"]
    figure.add_hline(target, line={"color": _COLORS[race.REFERENCE], "width": 1, "dash": "dot"})
    figure.update_yaxes(title_text="validation loss, nats per token", row=1, col=1)
    sizes = ", ".join(f"{name} {run['parameters'] / 1e6:.1f} M parameters" for name, run in runs.items())
    figure.update_layout(title=f"{SIZE}: {sizes}", template="plotly_white", height=480)
    figure.write_html(file, include_plotlyjs=True)


def _shown(curve: Sequence[Run]) -> list[int]:
    """Token counts of some of the points, the last among them."""
    last = len(curve) - 1
    places = sorted({round(number * last / (_POINTS_SHOWN - 1)) for number in range(_POINTS_SHOWN)})
    return [curve[place]["tokens"] for place in places]


def _cell(curve: Sequence[Run], tokens: int) -> str:
    """The point nearest to so many tokens."""
    point = min(curve, key=lambda each: abs(each["tokens"] - tokens))
    return f"{point['cpu_s']:>16.0f}{point['val_loss']:>9.4f}"


def _settings() -> dict[str, Any]:
    size = settings.SIZES[SIZE]
    return {race.REFERENCE: vars(size.reference), OURS: size.ours.model_dump(mode="json")}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.recipe.curves", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sides", nargs="*", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core both run on")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--cache", type=Path, default=home / "raymill-benchmarks", help="folder that is kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
