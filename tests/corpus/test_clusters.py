"""Clusters and repeats against plain Python, in one range of keys and in many, whole and in shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raymill.corpus.clusters import cluster_sizes, find_duplicates, find_repeats
from raymill.corpus.dedup import BANDS, SIGNATURE_WIDTH


def signatures_of(rows: list[tuple[int, list[int]]]) -> list[np.ndarray]:
    """Hand-made signatures of one shard: a text hash and the first few band keys per document."""
    made = np.zeros((SIGNATURE_WIDTH, len(rows)), np.uint64)
    for column, (text, keys) in enumerate(rows):
        made[0, column] = text
        made[2 : 2 + len(keys), column] = keys
    return [made]


def test_the_first_of_a_group_stays() -> None:
    rows = [(5, [1]), (6, [2]), (5, [1]), (5, [1]), (6, [2])]
    found = find_duplicates(signatures_of(rows))
    assert found.roots.tolist() == [0, 1, 0, 0, 1]
    assert found.exact.tolist() == [False, False, True, True, True]
    assert not found.near.any()
    assert cluster_sizes(found) == {2: 1, 3: 1}


def test_both_halves_of_the_text_hash_count() -> None:
    (made,) = signatures_of([(5, []), (5, []), (5, []), (5, [])])
    made[1] = [7, 8, 8, 7]
    assert find_duplicates([made]).exact.tolist() == [False, False, True, True]


def test_no_key_is_no_link() -> None:
    assert find_duplicates(signatures_of([(1, []), (2, [])])).roots.tolist() == [0, 1]


def test_a_copy_of_a_near_duplicate_is_an_exact_one() -> None:
    found = find_duplicates(signatures_of([(1, [9]), (2, [9]), (2, [9])]))
    assert found.near.tolist() == [False, True, False]
    assert found.exact.tolist() == [False, False, True]


def test_a_cluster_is_joined_over_bands_and_keeps_its_smallest() -> None:
    rows = [(1, [10, 20]), (2, [11, 21]), (3, [12, 20]), (4, [11, 22]), (5, [12, 22]), (6, [13, 23])]
    assert find_duplicates(signatures_of(rows)).roots.tolist() == [0, 0, 0, 0, 0, 5]


@pytest.mark.parametrize("band", range(BANDS))
def test_one_band_is_enough(band: int) -> None:
    rows = [(text, [100 * text + each if each != band else 7 for each in range(BANDS)]) for text in (1, 2)]
    assert find_duplicates(signatures_of(rows)).roots.tolist() == [0, 0]


def test_a_key_counts_only_within_its_band() -> None:
    assert find_duplicates(signatures_of([(1, [10, 20]), (2, [20, 10])])).roots.tolist() == [0, 1]


@pytest.mark.parametrize("keys_at_once", [1 << 22, 16])
@pytest.mark.parametrize("cuts", [[], [1, 90, 90, 250]], ids=["one shard", "five shards"])
def test_clusters_are_those_of_plain_python(tmp_path: Path, cuts: list[int], keys_at_once: int) -> None:
    draw = np.random.default_rng(1)
    made = np.zeros((SIGNATURE_WIDTH, 300), np.uint64)
    made[0] = np.arange(300) * 2**55
    spread = draw.integers(1, 2**64, 400, np.uint64)
    made[2:5] = spread[draw.integers(0, 400, (3, 300))]
    smallest = list(range(300))
    linked = [np.flatnonzero((made[2:5] == column[:, None]).any(axis=0)) for column in made[2:5].T]
    before: list[int] = []
    while smallest != before:
        before = smallest
        smallest = [min(before[other] for other in others) for others in linked]
    shards = []
    for number, shard in enumerate(np.split(made, cuts, axis=1)):
        np.save(tmp_path / f"{number}.npy", shard)
        shards.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    assert find_duplicates(shards, keys_at_once).roots.tolist() == smallest
    assert len(set(smallest)) < 250


def test_no_documents() -> None:
    found = find_duplicates([np.zeros((SIGNATURE_WIDTH, 0), np.uint64)])
    assert found.exact.tolist() == []
    assert cluster_sizes(found) == {}


@pytest.mark.parametrize("keys_at_once", [1 << 22, 8])
def test_repeats_are_those_of_plain_python(keys_at_once: int) -> None:
    draw = np.random.default_rng(2)
    values = draw.integers(1, 2**64, 40, np.uint64)[draw.integers(0, 40, 200)]
    stays = draw.random(200) < 0.8
    seen: set[int] = set()
    expected = []
    for value, there in zip(values.tolist(), stays.tolist(), strict=True):
        expected.append(there and value in seen)
        if there:
            seen.add(value)
    cuts = [0, 70, 71]
    found = find_repeats(np.split(values, cuts), np.split(stays, cuts), keys_at_once)
    assert np.concatenate(found).tolist() == expected
    assert [len(flags) for flags in found] == [0, 70, 1, 129]
