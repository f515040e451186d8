"""The facts that belong beside every figure: what ran, on what, and how busy it was."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe(libraries: Sequence[str], peers: dict[str, str]) -> dict[str, Any]:
    """Everything as JSON: versions of our own `libraries`, and of the peers'.

    `load` is the 1-minute load average at the start, `highest_load` may grow (see `update`).
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "peers": peers,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "highest_load": os.getloadavg()[0],
    }


def update(facts: dict[str, Any]) -> None:
    """Notes how busy the machine became; called after each work."""
    facts["highest_load"] = max(facts["highest_load"], os.getloadavg()[0])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit measured, with + where the working tree differs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None
