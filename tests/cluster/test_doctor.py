"""The doctor: each thing that has stopped someone is found, and its fix is named."""

from __future__ import annotations

import os
import socket
from importlib import metadata
from pathlib import Path

import pytest

from raymill.cluster import doctor, resources, session
from raymill.cluster.config import ClusterConfig, Role, Roles
from raymill.cluster.doctor import Finding, diagnose

GIB = 2**30
pytestmark = pytest.mark.usefixtures("home")


def test_this_machine_is_looked_at_whole(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in diagnose(ClusterConfig(storage=str(tmp_path)))}
    assert {"python", "torch", "ray", "memory", "disk", "port", "token", "leftovers", "promtool"} <= set(findings)
    assert findings["torch"].ok
    assert findings["ray"].ok
    assert all(finding.found for finding in findings.values())
    assert all(finding.ok or finding.fix for finding in findings.values())


def bad(finding: Finding, found: str, fix: str) -> None:
    assert not finding.ok
    assert found in finding.found
    assert fix in finding.fix


def test_an_old_python() -> None:
    bad(doctor.check_python((3, 10)), "3.10", "3.11")


@pytest.mark.parametrize(("name", "version"), [("torch", "2.12.1"), ("ray", "2.61.0")])
def test_another_version(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    bad(doctor.check_package(name), version, f"pip install '{name}")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    bad(doctor.check_package("ray"), "not installed", "pip install 'ray")


def test_too_few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cpus", lambda: 2)
    config = ClusterConfig(roles=Roles(train=Role(cpus_per_worker=4)))
    bad(doctor.check_cpus(config), "2, one train worker takes 4", "cpus_per_worker")
    assert doctor.check_cpus(ClusterConfig()).ok


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 3 * GIB)
    bad(doctor.check_memory(ClusterConfig()), "3.0 GiB free", "memory_gib_per_worker")
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 4 * GIB)
    assert doctor.check_memory(ClusterConfig()).ok


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "shared_memory_bytes", lambda: 64 * 2**20)
    bad(doctor.check_shared_memory(ClusterConfig()), "0.06 GiB free", "--shm-size")
    monkeypatch.setattr(resources, "shared_memory_bytes", lambda: None)
    assert doctor.check_shared_memory(ClusterConfig()).ok


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path / "not" / "yet").ok
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: FullDisk)
    bad(doctor.check_disk(tmp_path / "not" / "yet"), "0.0 GiB free", "free 5 GiB")


class FullDisk:
    free = 1000


def test_a_storage_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    bad(doctor.check_disk(tmp_path), "cannot be written", "set storage")


def test_a_temp_folder_of_someone_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(session, "_LONGEST_TEMP", 1000)
    assert doctor.check_temp().ok
    (tmp_path / f"raymill-{os.getuid()}").rmdir()
    (tmp_path / f"raymill-{os.getuid()}").symlink_to(tmp_path)
    bad(doctor.check_temp(), "belongs to someone else", "TMPDIR")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_names_who_holds_it(host: str) -> None:
    with socket.socket() as holder:
        holder.bind((host, 0))
        holder.listen()
        port = holder.getsockname()[1]
        bad(doctor.check_port("127.0.0.1", port), f"taken by pid {os.getpid()} (", f"port={port + 1}")
    assert doctor.check_port("127.0.0.1", port).ok


def test_a_port_held_by_another_user_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    row = "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1 0 100 0"
    (tmp_path / "net" / "tcp").write_text(f"header\n{row}\n")
    assert doctor.port_holder(8000, tmp_path) is None
    (tmp_path / "77" / "fd").mkdir(parents=True)
    (tmp_path / "77" / "fd" / "3").symlink_to("socket:[4242]")
    (tmp_path / "77" / "comm").write_text("nginx\n")
    assert doctor.port_holder(8000, tmp_path) == "pid 77 (nginx)"
    assert doctor.port_holder(8001, tmp_path) is None


def test_a_token_others_can_read() -> None:
    assert doctor.check_token().ok
    path = session.ensure_token()
    assert doctor.check_token().ok
    path.chmod(0o644)
    bad(doctor.check_token(), "mode 644", f"chmod 600 {path}")


def test_leftovers_of_a_dead_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cmdline").write_bytes(b"raylet\0--session=/tmp/raymill-0/7/session_x")
    monkeypatch.setattr(doctor, "dead_sessions", lambda: [Path("/tmp/raymill-0/77")])
    assert doctor.check_leftovers(tmp_path).ok
    monkeypatch.setattr(doctor, "dead_sessions", lambda: [Path("/tmp/raymill-0/7")])
    bad(doctor.check_leftovers(tmp_path), "1 Ray processes", "kill 42")


def test_an_optional_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.check_tool("promtool", "promtool", "get it")
    assert finding.ok
    assert "optional" in finding.found
