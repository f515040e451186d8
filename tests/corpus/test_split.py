"""Train or val by a document's own hash."""

from __future__ import annotations

import numpy as np
import pytest

from raymill.corpus.split import choose_val

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)


def test_the_share_is_about_right() -> None:
    assert choose_val(HASHES, 0.05).mean() == pytest.approx(0.05, abs=0.005)


def test_more_input_moves_no_document() -> None:
    assert (choose_val(HASHES, 0.05)[:1000] == choose_val(HASHES[:1000], 0.05)).all()


def test_a_larger_share_only_adds() -> None:
    assert (choose_val(HASHES, 0.1) >= choose_val(HASHES, 0.05)).all()


@pytest.mark.parametrize("hashes", [[2**63, 2**62], [1, 2], [2**64 - 1, 2**64 - 2, 2**63]])
def test_both_splits_get_one(hashes: list[int]) -> None:
    val = choose_val(np.array(hashes, np.uint64), 0.01)
    assert val.any()
    assert not val.all()
    assert val.sum() == 1


def test_one_document_cannot_be_split() -> None:
    assert choose_val(np.array([2**63], np.uint64), 0.01).tolist() == [False]
