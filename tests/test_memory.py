"""Freed memory goes back to the system when it is told to."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from raymill.memory import give_back_memory

PIECES, PIECE_BYTES = 1000, 64 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps it")
def test_what_lay_between_things_in_use_is_given_back() -> None:
    pieces = [np.ones(PIECE_BYTES, np.uint8) for _ in range(PIECES)]
    in_use = pieces[::50]
    del pieces
    before = resident_bytes()
    give_back_memory()
    assert before - resident_bytes() > PIECES * PIECE_BYTES / 2
    assert all(piece.all() for piece in in_use)


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
