"""Is this machine fit to run raymill? One finding per thing that has stopped someone, each with its fix.

Looks only; changes nothing and starts nothing but `--version` of tools. Takes under a second.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from raymill.cluster import resources
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import dead_sessions, temp_root, token_path
from raymill.errors import MachineError

_GIB = 2**30
_RAY_ITSELF_GIB = 1.5  # Ray's own processes and the driver, measured 1.2
_DISK_GIB = 5
_PINNED = ("torch", "ray")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def diagnose(config: ClusterConfig) -> list[Finding]:
    """Every finding for this machine and this cluster file, the good ones too."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        *(lambda name=name: check_package(name) for name in _PINNED),
        lambda: check_cpus(config),
        lambda: check_memory(config),
        lambda: check_shared_memory(config),
        lambda: check_disk(Path(config.storage)),
        check_temp,
        lambda: check_port(config.endpoint.host, config.endpoint.port),
        check_token,
        check_leftovers,
        lambda: check_tool("g++", "C++ compiler", "torch.compile needs one: apt install g++, or leave it off"),
        lambda: check_tool("promtool", "promtool", "it checks the alert rules; it comes with Prometheus"),
    ]
    return [check() for check in checks]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    found = f"{version[0]}.{version[1]} in {sys.prefix}"
    return Finding("python", version >= (3, 11), found, "raymill needs Python 3.11 or newer")


def check_package(name: str) -> Finding:
    """An installed version against the one raymill asks for: every machine of a cluster must have the same."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("raymill") or ()]
    pinned = next(each for each in wanted if each.name == name and each.marker is None)
    fix = f"pip install '{pinned}'"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)
    return Finding(name, pinned.specifier.contains(found, prereleases=True), f"{found}, wanted {pinned.specifier}", fix)


def check_cpus(config: ClusterConfig) -> Finding:
    have, need = resources.usable_cpus(), config.roles.train.cpus_per_worker
    fix = "lower roles.*.cpus_per_worker in the cluster file, or give the container more CPUs"
    return Finding("cpus", have >= need, f"{have}, one train worker takes {need:g}", fix)


def check_memory(config: ClusterConfig) -> Finding:
    have = resources.available_memory_bytes() / _GIB
    need = config.roles.train.memory_gib_per_worker + _RAY_ITSELF_GIB
    fix = "close other programs, or lower roles.train.memory_gib_per_worker"
    return Finding("memory", have >= need, f"{have:.1f} GiB free, one train worker and Ray take {need:g}", fix)


def check_shared_memory(config: ClusterConfig) -> Finding:
    free, need = resources.shared_memory_bytes(), config.object_store_gib
    if free is None:
        return Finding("shared memory", True, "this system has no /dev/shm; Ray uses files")
    fix = "docker run --shm-size=1g, or lower object_store_gib; Ray falls back to slower files"
    return Finding(
        "shared memory", free / _GIB >= need, f"{free / _GIB:.2f} GiB free, object_store_gib is {need:g}", fix
    )


def check_disk(storage: Path) -> Finding:
    folder = storage.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", False, f"{folder} cannot be written", "set storage in the cluster file to a folder of yours"
        )
    free = shutil.disk_usage(folder).free / _GIB
    return Finding(
        "disk", free >= _DISK_GIB, f"{free:.1f} GiB free for {storage}", f"free {_DISK_GIB} GiB, or move storage"
    )


def check_temp() -> Finding:
    try:
        root = temp_root()
    except (MachineError, OSError) as error:
        return Finding("temp folder", False, str(error).splitlines()[0], "set TMPDIR to a short path of your own")
    free = shutil.disk_usage(root).free / _GIB
    ok = free >= 1 and os.access(root, os.W_OK)
    return Finding("temp folder", ok, f"{root}, {free:.1f} GiB free", "set TMPDIR to a short path with 1 GiB free")


def check_port(host: str, port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            return Finding(
                "port", False, f"{port} needs root", "use a port above 1023: --set cluster.endpoint.port=8000"
            )
        except OSError:
            holder = port_holder(port) or "another program"
            fix = f"stop it, or use another port: --set cluster.endpoint.port={port + 1}"
            return Finding("port", False, f"{host}:{port} is taken by {holder}", fix)
    return Finding("port", True, f"{host}:{port} is free")


def port_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """`pid 4711 (python)` of the process that listens on a port; None when it cannot be seen (another user's)."""
    inodes = set()
    for table in (proc / "net" / "tcp", proc / "net" / "tcp6"):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: listening
                inodes.add(f"socket:[{fields[9]}]")
    for link in proc.glob("[0-9]*/fd/*") if inodes else ():
        try:
            if str(link.readlink()) in inodes:
                process = link.parent.parent
                return f"pid {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue
    return None


def check_token() -> Finding:
    path = token_path()
    if not path.exists():
        return Finding("token", True, "none yet; the first run makes it")
    mode = path.stat().st_mode & 0o777
    fix = f"chmod 600 {path}"
    return Finding("token", mode & 0o077 == 0, f"{path} has mode {mode:o}", fix)


def check_leftovers(proc: Path = Path("/proc")) -> Finding:
    """Ray processes whose raymill died; they should end by themselves within a minute."""
    dead = {f"{folder}/" for folder in dead_sessions()}
    left = []
    for command in proc.glob("[0-9]*/cmdline") if dead else ():
        try:
            text = command.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(folder in text for folder in dead):
            left.append(command.parent.name)
    fix = f"wait a minute, then: kill {' '.join(left)}"
    return Finding("leftovers", not left, f"{len(left)} Ray processes of dead runs" if left else "none", fix)


def check_tool(program: str, name: str, fix: str) -> Finding:
    """An optional tool: its absence is told, not held against the machine."""
    path = shutil.which(program)
    return Finding(name, True, path or f"not found (optional): {fix}", fix)
