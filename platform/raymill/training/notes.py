"""What a worker has to say to the user beside figures: lines of a file, which who placed the workers shows."""

from __future__ import annotations

from pathlib import Path

NOTES = "notes.txt"


class Notes:
    """The notes of the run in this folder."""

    def __init__(self, work: Path) -> None:
        self._path = work / NOTES
        self._shown = 0

    def add(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def take_new(self) -> list[str]:
        """Whole lines not taken before."""
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
        new, self._shown = lines[self._shown :], len(lines)
        return new
