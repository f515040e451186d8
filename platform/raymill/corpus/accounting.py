"""Where every record went: records + pieces = kept + dropped by reason + quarantined by reason, exactly.

Pieces are the documents beyond the first that a record was cut into; without segmentation there are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Account:
    """Counts of one shard or of a whole corpus."""

    records: int = 0
    """Records the readers met, readable or not."""
    pieces: int = 0
    """Documents beyond the first of each record that was cut into segments."""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    """What was changed in documents: repaired, removed_lines, repeated_blocks, redacted_<kind>."""

    def add(self, other: Account) -> None:
        self.records += other.records
        self.pieces += other.pieces
        self.kept += other.kept
        self.dropped += other.dropped
        self.quarantined += other.quarantined
        self.changed += other.changed

    def drop_kept(self, reason: str, count: int) -> None:
        """Moves documents that were kept so far to a reason."""
        self.kept -= count
        if count:
            self.dropped[reason] += count

    def check(self) -> None:
        """Every record has gone to one place. A gap is a bug, never the user's fault."""
        placed = self.kept + self.dropped.total() + self.quarantined.total()
        assert self.records + self.pieces == placed, f"{self.records} records came in, {placed} are placed: {self}"

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "pieces": self.pieces,
            "kept": self.kept,
            "dropped": _ranked(self.dropped),
            "quarantined": _ranked(self.quarantined),
            "changed": _ranked(self.changed),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Account:
        counters = {name: Counter(values[name]) for name in ("dropped", "quarantined", "changed")}
        return cls(values["records"], values["pieces"], values["kept"], **counters)

    def losses(self) -> str:
        """`dropped 228: too_short 120, exact_duplicate 108; quarantined 2: not_utf8 2`."""
        return f"{_listed('dropped', self.dropped)}; {_listed('quarantined', self.quarantined)}"


def _ranked(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _listed(name: str, counter: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in _ranked(counter).items())
    return f"{name} {counter.total():,}" + (f": {reasons}" if reasons else "")
