"""A user with an empty home, so that no test reads or changes the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill.cluster import session


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A user who never ran raymill; the real environment and temporary folders are out of reach."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("RAY_") or name == "XDG_STATE_HOME":
            del os.environ[name]
    os.environ["HOME"] = str(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
    session.set_environment(foreign=False)  # Ray keeps what it read; the session's own cluster needs its token again
