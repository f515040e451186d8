"""Fixtures every room may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig()) as c:
        c.connect()
        yield c
