"""Lines and paragraphs are found, told apart by their text alone, and cut without a trace."""

from __future__ import annotations

import numpy as np
import pytest

from raymill.corpus.blocks import SHORTEST_BYTES, cut_blocks, hash_blocks

MENU = b"Home | Products | About us | Contact | Imprint"
STORY = b"The river of glass follows every bridge to the sea."
TAIL = b"A short line.\nAnd a second line that is long enough to count."


def test_lines_are_told_apart_by_their_text() -> None:
    hashes = hash_blocks(b"\n".join([MENU, STORY, b"  " + MENU + b"\t", TAIL]), "line")
    assert len(hashes) == 4  # the short line is none
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3


def test_a_paragraph_is_what_stands_between_blank_lines() -> None:
    text = MENU + b"\n" + STORY + b"\n\n\n" + TAIL + b"\n\n" + MENU + b"\n" + STORY
    hashes = hash_blocks(text, "paragraph")
    assert len(hashes) == 3
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("size", [SHORTEST_BYTES - 1, SHORTEST_BYTES])
def test_short_blocks_are_none(size: int) -> None:
    assert len(hash_blocks(b"x" * size, "line")) == (size >= SHORTEST_BYTES)


def test_cut_blocks_leave_no_gap() -> None:
    text = b"\n".join([MENU, STORY, TAIL, MENU])
    flags = np.array([True, False, False, True])
    assert cut_blocks(text, "line", flags) == STORY + b"\n" + TAIL
    paragraphs = MENU + b"\n\n" + STORY + b"\n\n" + TAIL
    assert cut_blocks(paragraphs, "paragraph", np.array([False, True, False])) == MENU + b"\n\n" + TAIL


@pytest.mark.parametrize("text", [b"", b"\n\n\n", b"x", b"x" * 200 + b"\n", b"\n" * 3 + b"y" * 100 + b"\n" * 40])
@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_nothing_to_cut_changes_nothing_but_the_ends(text: bytes, unit: str) -> None:
    blocks = hash_blocks(text, unit)  # type: ignore[arg-type]
    assert cut_blocks(text, unit, np.zeros(len(blocks), np.bool_)) == text.strip(b"\n")  # type: ignore[arg-type]
