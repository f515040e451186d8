"""What a machine can give is what its container lets it have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymill.cluster import resources


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits(tmp_path: Path) -> None:
    assert resources.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert resources.memory_bytes(tmp_path) > 2**29


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense"])
def test_no_limit_set(tmp_path: Path, text: str) -> None:
    write(tmp_path / "cpu.max", text)
    write(tmp_path / "memory.max", "max\n")
    assert resources.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert resources.memory_bytes(tmp_path) == resources.memory_bytes(tmp_path / "none")


def test_a_version_2_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write(tmp_path / "cpu.max", "150000 100000\n")
    write(tmp_path / "memory.max", "104857600\n")
    assert resources.usable_cpus(tmp_path) == 2
    assert resources.memory_bytes(tmp_path) == 100 * 2**20


def test_a_version_1_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", "104857600\n")
    assert resources.usable_cpus(tmp_path) == 1
    assert resources.memory_bytes(tmp_path) == 100 * 2**20


def test_a_version_1_machine_without_quota(tmp_path: Path) -> None:
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert resources.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_available_memory(tmp_path: Path) -> None:
    write(tmp_path / "meminfo", "MemTotal: 9999 kB\nMemAvailable:       1234 kB\n")
    assert resources.available_memory_bytes(tmp_path / "meminfo") == 1234 * 1024
    assert resources.available_memory_bytes(tmp_path / "none") == resources.memory_bytes()


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("0,1,2", 2)])
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert resources.local_gpus(tmp_path) == count


def test_shared_memory(tmp_path: Path) -> None:
    assert resources.shared_memory_bytes(tmp_path / "none") is None
    free = resources.shared_memory_bytes(tmp_path)
    assert free is not None
    assert free > 0
