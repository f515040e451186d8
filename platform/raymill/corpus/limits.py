"""How records become documents: what every reader is told beside its file, and how a record is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Extractor = Literal["resiliparse", "trafilatura"]


@dataclass(frozen=True)
class ReadLimits:
    """How records become documents."""

    segment_bytes: int
    """A txt or md file longer than this is cut at its blank lines."""
    max_document_bytes: int
    """Records longer than this are quarantined."""
    html: Extractor = "resiliparse"
    """What finds the main content of a page."""


class RecordError(Exception):
    """A record that is no document: a reason of one word, and what exactly was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
