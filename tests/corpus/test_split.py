"""Train or val by a document's own hash."""

from __future__ import annotations

import numpy as np
import pytest

from raymill.corpus.split import choose_val

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)


def chosen(hashes: np.ndarray, val_fraction: float, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """For all documents staying, in as many shards."""
    shards = np.split(hashes, cuts)
    return np.concatenate(choose_val(shards, [np.ones(len(shard), np.bool_) for shard in shards], val_fraction))


def test_the_share_is_about_right() -> None:
    assert chosen(HASHES, 0.05).mean() == pytest.approx(0.05, abs=0.005)


def test_more_input_moves_no_document() -> None:
    assert (chosen(HASHES, 0.05)[:1000] == chosen(HASHES[:1000], 0.05)).all()


def test_a_larger_share_only_adds() -> None:
    assert (chosen(HASHES, 0.1) >= chosen(HASHES, 0.05)).all()


@pytest.mark.parametrize("cuts", [(), (0, 1, 1)], ids=["one shard", "four shards"])
@pytest.mark.parametrize("hashes", [[2**63, 2**62], [1, 2], [2**64 - 1, 2**64 - 2, 2**63]])
def test_both_splits_get_one(hashes: list[int], cuts: tuple[int, ...]) -> None:
    val = chosen(np.array(hashes, np.uint64), 0.01, cuts)
    assert val.sum() == 1
    assert not val[np.argmax(hashes)], "the smallest hashes go first"


def test_one_document_cannot_be_split() -> None:
    assert chosen(np.array([2**63], np.uint64), 0.01).tolist() == [False]


def test_who_does_not_stay_goes_nowhere() -> None:
    hashes, stays = np.array([5, 6, 2**63, 2**62], np.uint64), np.array([False, False, True, True])
    (val,) = choose_val([hashes], [stays], 0.01)
    assert val.tolist() == [False, False, False, True]
