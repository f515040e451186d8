"""The report of a training run, as one page a browser opens offline; and a run's newest step as one line of a terminal.

In: metrics.jsonl, validation.jsonl and events.jsonl of a folder, and what the run was and reached. Out: report.html
(telemetry/page.py), the same bytes for the same files. A curve has at most 1,000 points: of each stretch its lowest and
its highest, so that no spike is smoothed away. Costs half a second and a process of its own, since plotly would hold
60 MB in the caller's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymill.artifact import write_atomic
from raymill.telemetry.page import render_page
from raymill.training.guard import EVENTS
from raymill.training.metrics import METRICS, VALIDATION, read_rows

REPORT = "report.html"
_MAX_POINTS = 1000
_EVENTS_SHOWN = 200
_COLORS = {"train": "#4a7fb5", "validation": "#c2703d", "event": "#b4483c"}
_TEMPLATE = Path(__file__).with_name("report.html.j2")

Rows = Sequence[Mapping[str, Any]]


def write_report(folder: Path, title: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Writes report.html beside the files it is made from. `settings` may be nested; both hold JSON values."""
    told = json.dumps({"title": title, "settings": settings, "figures": figures})
    command = [sys.executable, "-m", "raymill.training.report", str(folder)]
    subprocess.run(command, input=told.encode(), check=True)


def live_line(row: Mapping[str, Any], total_steps: int, validation: Mapping[str, Any] | None) -> str:
    """A run's newest step in one line. `row`: last of metrics.jsonl; `validation`: last of validation.jsonl, if any."""
    loss = "no number" if row["loss"] is None else f"{row['loss']:.3f}"
    parts = [f"step {row['step']:,}/{total_steps:,}", f"loss {loss}"]
    if validation is not None:
        scored = validation["loss_nats"]
        parts.append("val no number" if scored is None else f"val {scored:.3f}")
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {100 * row['mfu']:.0f} %")
    parts += [_size(row["memory_bytes"]), f"lr {row['learning_rate']:.2e}"]
    if "event" in row:
        parts.append(row["event"])
    return "  ".join(parts)


def render_report(
    title: str, settings: Mapping[str, Any], figures: Mapping[str, Any], metrics: Rows, validation: Rows, events: Rows
) -> str:
    """The page, self-contained HTML."""
    values = {
        "title": title,
        "settings": _flat(settings),
        "figures": figures,
        "last": metrics[-1] if metrics else None,
        "events": [{**event, "places": _places(event["sequences"])} for event in events[:_EVENTS_SHOWN]],
        "more_events": max(0, len(events) - _EVENTS_SHOWN),
    }
    return render_page(_TEMPLATE, values, _plots(metrics, validation, events), {"figure": _figure})


def thinned(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """At most 1,000 points of a curve, the first and the last among them; points without a number are left out."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    if len(points) > _MAX_POINTS:
        stretches = _MAX_POINTS // 2 - 1
        inner, kept = points[1:-1], {0, len(points) - 1}
        for number in range(stretches):
            begin, end = (len(inner) * edge // stretches for edge in (number, number + 1))
            stretch = range(begin + 1, end + 1)
            kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
        points = [points[at] for at in sorted(kept)]
    return [x for x, _ in points], [y for _, y in points]


def _plots(metrics: Rows, validation: Rows, events: Rows) -> dict[str, Any]:
    """Figures by title, over the tokens read so far. A curve that no row has is left out."""
    import plotly.graph_objects as go

    tokens_at = {row["step"]: row["tokens"] for row in metrics}

    def curve(rows: Rows, name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        values = [None if row[name] is None else row[name] * scale for row in rows]
        return thinned([tokens_at[row["step"]] for row in rows], values)

    def line(rows: Rows, name: str, label: str, color: str, scale: float = 1.0) -> Any:
        xs, ys = curve(rows, name, scale)
        mode = "lines" if len(xs) > 40 else "lines+markers"
        style = {"color": _COLORS[color], "width": 1.5}
        return go.Scatter(x=xs, y=ys, name=label, mode=mode, line=style, hovertemplate="%{y:.5g}")

    scored = [row for row in validation if row["step"] in tokens_at]
    plots = {}
    for title, unit, lines in (
        ("Loss", "nats per token", [(metrics, "loss", "train", 1), (scored, "loss_nats", "validation", 1)]),
        ("Validation", "bits per byte", [(scored, "bits_per_byte", "validation", 1)]),
        ("Accuracy", "share of tokens", [(scored, "accuracy", "validation", 1)]),
        ("Learning rate", "", [(metrics, "learning_rate", "train", 1)]),
        ("Gradient norm", "before clipping", [(metrics, "gradient_norm", "train", 1)]),
        ("Speed", "tokens/s", [(metrics, "tokens_per_s", "train", 1)]),
        ("MFU", "% of the peak", [(metrics, "mfu", "train", 100)]),
        ("Memory", "MB, rank 0", [(metrics, "memory_bytes", "train", 1e-6)]),
    ):
        drawn = [line(rows, name, label, label, scale) for rows, name, label, scale in lines]
        drawn = [scatter for scatter in drawn if scatter.x]
        if drawn:
            plots[title] = go.Figure(drawn)
            plots[title].update_layout(
                xaxis={"title": "tokens"}, yaxis={"title": unit}, showlegend=len(drawn) > 1, hovermode="x unified",
                legend={"orientation": "h", "y": 1.12, "x": 0}, height=360 if title == "Loss" else 240,
            )  # fmt: skip
    for event in events[:_EVENTS_SHOWN] if "Loss" in plots else ():
        if event["step"] in tokens_at:
            style = {"color": _COLORS["event"], "width": 1, "dash": "dot"}
            plots["Loss"].add_vline(tokens_at[event["step"]], line=style)
    return plots


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`optimizer.name: muon` and so on: settings as --set takes them."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _figure(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _places(sequences: Rows) -> str:
    """Where an event's sequences stand, the first few."""
    told = [", ".join(f"{name} {value}" for name, value in place.items()) for place in sequences[:3]]
    return "; ".join(told) + (f"; and {len(sequences) - 3:,} more" if len(sequences) > 3 else "")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _rows = [read_rows(_folder / name) for name in (METRICS, VALIDATION, EVENTS)]
    _told = json.loads(sys.stdin.buffer.read())
    write_atomic(_folder / REPORT, render_report(_told["title"], _told["settings"], _told["figures"], *_rows))
