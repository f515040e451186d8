"""Where every record went: records = kept + dropped by reason + quarantined by reason, exactly."""

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
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    removed_lines: int = 0
    """Lines of notices cut out of documents that were judged."""

    def add(self, other: Account) -> None:
        self.records += other.records
        self.kept += other.kept
        self.dropped += other.dropped
        self.quarantined += other.quarantined
        self.removed_lines += other.removed_lines

    def drop_kept(self, reason: str, count: int) -> None:
        """Moves documents that were kept so far to a reason."""
        self.kept -= count
        if count:
            self.dropped[reason] += count

    def check(self) -> None:
        """Every record has gone to one place. A gap is a bug, never the user's fault."""
        placed = self.kept + self.dropped.total() + self.quarantined.total()
        assert self.records == placed, f"{self.records} records came in, {placed} are accounted for: {self}"

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "kept": self.kept,
            "dropped": _ranked(self.dropped),
            "quarantined": _ranked(self.quarantined),
            "removed_lines": self.removed_lines,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Account:
        counters = {name: Counter(values[name]) for name in ("dropped", "quarantined")}
        return cls(values["records"], values["kept"], removed_lines=values["removed_lines"], **counters)

    def losses(self) -> str:
        """`dropped 228: too_short 120, exact_duplicate 108; quarantined 2: not_utf8 2`."""
        return f"{_listed('dropped', self.dropped)}; {_listed('quarantined', self.quarantined)}"


def _ranked(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _listed(name: str, counter: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in _ranked(counter).items())
    return f"{name} {counter.total():,}" + (f": {reasons}" if reasons else "")
