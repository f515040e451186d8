"""What this machine can really give: a container's share counts, not the host's size.

Reads /proc and /sys, imports nothing, costs microseconds. Memory and CPUs come from cgroup v2 or v1 where they are
limited there: a container of 2 CPUs on a 64-core host that starts 64 workers would spend its time switching.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_SHARED = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """CPU cores this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words(cgroup / "cpu.max") or [
        *_words(cgroup / "cpu/cpu.cfs_quota_us"),
        *_words(cgroup / "cpu/cpu.cfs_period_us"),
    ]
    if len(quota) == 2 and quota[0].isdigit():  # "max" and -1 mean no limit
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory this process may use: the machine's, or the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _words(cgroup / "memory.max") or _words(cgroup / "memory/memory.limit_in_bytes")
    return min(total, int(limit[0])) if limit and limit[0].isdigit() else total


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory free right now without swapping, never above `memory_bytes`."""
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return min(memory_bytes(), int(line.split()[1]) * 1024)
    return memory_bytes()


def shared_memory_bytes(folder: Path = _SHARED) -> int | None:
    """Free shared memory for Ray's objects; None where the system has no such folder."""
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def local_gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """NVIDIA GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
