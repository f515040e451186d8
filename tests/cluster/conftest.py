"""A user with an empty home, so that no test reads or changes the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill.cluster import session


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user who never ran raymill; the real environment is out of reach.

    A Ray that other tests left running in this process keeps the token it has read: told to read again here, it would
    find none and end the process.
    """
    monkeypatch.setattr(session, "_read_again", lambda: None)
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("RAY_") or name == "XDG_STATE_HOME":
            del os.environ[name]
    os.environ["HOME"] = str(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
