"""A small vocabulary of real text, trained once."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from raymill.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / name).read_text(encoding="utf-8") for name in ("textwrap.py", "string.py", "shlex.py")]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 600)
