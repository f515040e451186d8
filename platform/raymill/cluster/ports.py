"""Can the endpoint listen where the cluster file says? Asked by binding, before anything is started."""

from __future__ import annotations

import errno
import os
import socket

from raymill.cluster.config import ClusterConfig
from raymill.errors import MachineError


def check_endpoint_address(cluster: ClusterConfig) -> None:
    """MachineError when the endpoint's address cannot be had; only asked where the endpoint is on this machine."""
    if cluster.provider != "local" or cluster.address is not None:
        return
    host, port = cluster.endpoint.host, cluster.endpoint.port
    problem = _bind_problem(host, port)
    if problem == errno.EADDRINUSE:
        free = next((each for each in range(port + 1, port + 100) if not _bind_problem(host, each)), port + 1)
        raise MachineError(
            f"port {port} on {host} is taken",
            where="serve",
            why="another process listens there, perhaps an endpoint that is still up",
            fix=f"--set cluster.endpoint.port={free}, or `raymill stop`",
        )
    if problem is not None:
        raise MachineError(
            f"cannot listen on {host}:{port}",
            where="serve",
            why=os.strerror(problem),
            fix="set cluster.endpoint.host and port",
        )


def _bind_problem(host: str, port: int) -> int | None:
    """The errno that listening there gives, or None."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return None
