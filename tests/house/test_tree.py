"""The shape of the tree: what may stand where, and what may be called what."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager", "handler"}


def tracked_files() -> list[Path]:
    """What git knows of or would add; generated and ignored files are nobody's design."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [path for line in listing.splitlines() if (path := ROOT / line).exists()]


def test_platform_is_never_a_package() -> None:
    # It would shadow the standard module `platform`, and torch, numpy, ray and pip would all fail to import.
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_no_tests_under_platform() -> None:
    # pytest's importlib mode would insert a module named `platform` for them: the same accident.
    strays = [str(p) for p in (ROOT / "platform").rglob("*.py") if p.name.startswith("test_") or p.stem == "conftest"]
    assert strays == []


def test_no_forbidden_names() -> None:
    words = {
        str(path.relative_to(ROOT)): {part.split(".")[0].strip("_") for part in path.relative_to(ROOT).parts}
        for path in tracked_files()
    }
    assert len(words) > 20
    assert {name: sorted(parts & FORBIDDEN) for name, parts in words.items() if parts & FORBIDDEN} == {}


def test_files_open_with_their_story() -> None:
    sources = [path for path in (ROOT / "platform" / "raymill").rglob("*.py") if path.stat().st_size]
    silent = [str(path.relative_to(ROOT)) for path in sources if not path.read_text("utf-8").startswith('"""')]
    assert silent == []


def test_sources_are_ascii() -> None:
    suffixes = {".py", ".sh", ".yaml", ".toml"}
    wrong = [str(p) for p in tracked_files() if p.suffix in suffixes and not p.read_bytes().isascii()]
    assert wrong == []


def test_nothing_that_is_read_from_disk_is_unpickled() -> None:
    # numpy.load refuses pickles unless told. Ray's own rows between our driver and our workers are the exception; no file is ever one.
    unpickles = re.compile(r"\bpickle\b\.|torch\.load\(|allow_pickle|\bjoblib\b|\bdill\b")
    sources = (ROOT / "platform" / "raymill").rglob("*.py")
    found = {
        path.relative_to(ROOT / "platform" / "raymill").as_posix()
        for path in sources
        if unpickles.search(path.read_text())
    }
    assert found == {"cluster/data.py"}
