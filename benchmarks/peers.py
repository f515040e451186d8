"""The peers' own environment: a virtual environment in the cache folder, made on first use from pinned names.

Where the whole list cannot be installed, each name is tried alone; what is missing is
then named in the rows it belongs to, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Pins = Mapping[str, Sequence[str]]
"""Peer -> what it needs beside pip's own resolution, itself first."""


@dataclass(frozen=True)
class Peers:
    """An environment that is ready."""

    python: Path
    versions: dict[str, str]
    """Of the peers that are installed."""
    missing: dict[str, str]
    """Peer -> why it could not be installed."""


def ensure(cache: Path, pins: Pins, first: Sequence[str] = ()) -> Peers:
    """The environment of these pins; builds it when it is not there.

    `first` are exact pins that are installed before all others and that no peer's own wishes may move.
    """
    key = hashlib.sha256(json.dumps([pins, list(first), sys.version]).encode()).hexdigest()[:8]
    folder = cache / f"peers-{key}"
    report = folder / "installed.json"
    python = folder / "bin" / "python"
    if not report.exists():
        began = time.monotonic()
        print("building the peers' environment (once, some minutes) ...", file=sys.stderr, flush=True)
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
        missing = _install_all(python, pins, first)
        versions = _versions(python, [name for name in pins if name not in missing])
        report.write_text(json.dumps({"versions": versions, "missing": missing}, indent=1))
        print(f"... built in {time.monotonic() - began:.0f} s: {folder}", file=sys.stderr, flush=True)
    kept = json.loads(report.read_text())
    return Peers(python, kept["versions"], kept["missing"])


def _install_all(python: Path, pins: Pins, first: Sequence[str]) -> dict[str, str]:
    if first and (why := _install(python, list(first))) is not None:
        return dict.fromkeys(pins, why)
    everything = sorted({pin for group in pins.values() for pin in group})
    if _install(python, everything, first) is None:
        return {}
    return {name: why for name, group in pins.items() if (why := _install(python, list(group), first)) is not None}


def _install(python: Path, pins: list[str], fixed: Sequence[str] = ()) -> str | None:
    """None, or why it did not work. What is `fixed` stays as it is."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        if fixed:
            constraints.write("\n".join(fixed) + "\n")
            constraints.flush()
            command += ["--constraint", constraints.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or ["pip failed"])[-1][:200]


def _versions(python: Path, names: list[str]) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
