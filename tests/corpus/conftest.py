"""Documents that every rule keeps, and files to read them from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raymill.corpus.document import Record
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import Source, list_files

NOUNS = ["river", "mountain", "teacher", "window", "garden", "letter", "market", "engine"]
NOUNS += ["winter", "village", "doctor", "bridge", "forest", "island"]
VERBS = ["follows", "carries", "remembers", "paints", "answers", "crosses", "measures", "repairs", "visits", "watches"]
PLACES = ["near", "to", "with", "before", "behind", "and"]


@pytest.fixture
def prose() -> Callable[[int], str]:
    """`prose(seed)`: eight paragraphs that no rule objects to; other seeds share next to nothing."""

    def make(seed: int) -> str:
        draw = random.Random(seed)

        def sentence() -> str:
            words = f"The {draw.choice(NOUNS)} of {draw.choice(NOUNS)} {draw.randint(2, 99)}"
            return (
                f"{words} {draw.choice(VERBS)} every {draw.choice(NOUNS)} {draw.choice(PLACES)} {draw.choice(NOUNS)}s."
            )

        return "\n\n".join(" ".join(sentence() for _ in range(3)) for _ in range(8))

    return make


@pytest.fixture
def code() -> str:
    """A module that no rule objects to."""
    return (
        '"""Areas of simple shapes."""\n\nimport math\n\n\ndef circle(radius: float) -> float:\n'
        "    return math.pi * radius**2\n\n\ndef rectangle(width: float, height: float) -> float:\n"
        "    return width * height\n"
    )


@pytest.fixture
def read_file(tmp_path: Path) -> Callable[..., list[Record]]:
    """`read_file("a.txt", b"...", segment_bytes=..., text_field=...)`: every record of a file with this content."""

    def read_one(name: str, content: bytes, **changed: object) -> list[Record]:
        (tmp_path / name).write_bytes(content)
        limits = {
            field: changed.pop(field) for field in ("segment_bytes", "max_document_bytes", "html") if field in changed
        }
        (file,) = list_files([Source(path=str(tmp_path / name), **changed)])
        return list(read(file, ReadLimits(**{"segment_bytes": 1 << 16, "max_document_bytes": 1 << 20, **limits})))

    return read_one
