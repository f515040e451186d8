"""Rows: one work, ours and the peers' figures of one run, and how they are printed and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "raymill"


@dataclass(frozen=True)
class Row:
    """What one work gave."""

    work: str
    unit: str
    ours: float | None
    """None: ours failed, and the note says why."""
    peers: Mapping[str, float | None] = field(default_factory=dict)
    """None: the peer could not be installed or failed."""
    spread: float = 0.0
    """Of ours over the rounds: distance of the quartiles over the median."""
    lower_is_better: bool = False
    rounds: int = 1
    note: str = ""

    @property
    def best_peer(self) -> float | None:
        values = [value for value in self.peers.values() if value is not None]
        if not values:
            return None
        return min(values) if self.lower_is_better else max(values)

    @property
    def ratio(self) -> float | None:
        """Above 1 where ours is better than the best peer; None where there is no peer or it would be infinite."""
        best = self.best_peer
        if best is None or self.ours is None:
            return None
        over, under = (best, self.ours) if self.lower_is_better else (self.ours, best)
        return over / under if under else None

    def to_json(self) -> dict[str, Any]:
        names = ("work", "ours", "peers", "ratio", "unit", "spread", "rounds", "note")
        return {name: getattr(self, name) for name in names} | {"lower_is_better": self.lower_is_better}


def render(rows: Sequence[Row]) -> str:
    """The table, each row's note under it."""
    cells = [["work", "unit", "ours", "best peer", "ratio", "spread", "peers"]]
    cells += [
        [
            row.work,
            row.unit,
            figure(row.ours),
            figure(row.best_peer),
            "-" if row.ratio is None else f"{row.ratio:.3g}x",
            f"{row.spread:.0%}" if row.rounds > 1 else "-",
            ", ".join(f"{name} {figure(value)}" for name, value in row.peers.items()) or "-",
        ]
        for row in rows
    ]
    notes = "".join(f"\n  {row.work}: {row.note}" for row in rows if row.note)
    return columns(cells) + (f"\n\nnotes{notes}" if notes else "")


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, the first row as heading."""
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def figure(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def save(rows: Sequence[Row], machine: Mapping[str, Any], path: Path) -> None:
    """A JSON list of rows, the machine's facts in each."""
    listed = [row.to_json() | {"machine": machine} for row in rows]
    path.write_text(json.dumps(listed, indent=1) + "\n", "utf-8")
