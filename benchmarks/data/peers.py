"""The peers' own environment: a virtual environment in the cache folder, made on first use from pinned names.

Takes 1 to 2 minutes and 1.6 GB. Where the whole list cannot be installed, each name is tried alone; what is missing is
then named in the rows it belongs to, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

PINS = {
    "datatrove": ("datatrove==0.10.1", "spacy==3.8.18", "xxhash==3.6.0", "orjson==3.11.4", "tokenizers==0.23.3"),
    "text-dedup": ("text-dedup==0.4.0",),
    "rensa": ("rensa==0.5.0",),
    "datasketch": ("datasketch==2.0.0",),
    "tokenizers": ("tokenizers==0.23.3",),
    "tiktoken": ("tiktoken==0.14.0",),
}
"""What each peer needs beside pip's own resolution."""


@dataclass(frozen=True)
class Peers:
    """An environment that is ready."""

    python: Path
    versions: dict[str, str]
    """Of the peers that are installed."""
    missing: dict[str, str]
    """Peer -> why it could not be installed."""


def ensure(cache: Path) -> Peers:
    """The environment of these pins; builds it when it is not there."""
    key = hashlib.sha256(json.dumps([PINS, sys.version]).encode()).hexdigest()[:8]
    folder = cache / f"peers-{key}"
    report = folder / "installed.json"
    python = folder / "bin" / "python"
    if not report.exists():
        began = time.monotonic()
        print("building the peers' environment (once, 1-2 minutes) ...", file=sys.stderr, flush=True)
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
        missing = _install_all(python)
        versions = _versions(python, [name for name in PINS if name not in missing])
        report.write_text(json.dumps({"versions": versions, "missing": missing}, indent=1))
        print(f"... built in {time.monotonic() - began:.0f} s: {folder}", file=sys.stderr, flush=True)
    kept = json.loads(report.read_text())
    return Peers(python, kept["versions"], kept["missing"])


def _install_all(python: Path) -> dict[str, str]:
    everything = sorted({pin for pins in PINS.values() for pin in pins})
    if _install(python, everything) is None:
        return {}
    return {name: why for name, pins in PINS.items() if (why := _install(python, list(pins))) is not None}


def _install(python: Path, pins: list[str]) -> str | None:
    """None, or why it did not work."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
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
