"""What stands under the table: agreement of decisions, the LSH curve, packing, the line drawn to another size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmarks import peers
from benchmarks.data import agreement, curve, packing
from benchmarks.data.corpus import Library
from benchmarks.data.line import Run, cluster_key_s, job_settings, reach
from benchmarks.data.pins import PINS
from benchmarks.measure import Watched

from raymill.pipeline import load_job


def test_agreement_counts_decisions_and_classes() -> None:
    ours = [(None, "a"), (None, "b"), ("repeated_lines", "c"), ("too_short", "d"), (None, "e"), ("word_length", "f")]
    theirs = [(None, "a"), (None, "B"), ("top_2_gram", "c"), ("gopher_enough_stop_words", "d"), ("curly_bracket", "e")]
    found = agreement.compare(ours, [*theirs, ("gopher_above_avg_threshold", "f")])
    assert (found.decisions, found.classes, found.texts) == (5 / 6, 4 / 6, 0.5)
    assert found.differences == [("too short", "stop words", 1), ("kept", "curly bracket", 1)]


def test_similar_pairs_are_those_of_a_plain_comparison() -> None:
    sets = [{1, 2, 3}, {2, 3, 4}, {9}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, set()]
    pairs, similarity = curve.similar_pairs(sets)
    plain = {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in itertools.combinations(range(4), 2)}
    assert dict(zip(map(tuple, pairs.tolist()), similarity.tolist(), strict=True)) == {
        pair: value for pair, value in plain.items() if value >= curve.LOWEST
    }


def test_a_bin_is_inside_when_its_hits_are_likely() -> None:
    chance = np.full(100, 0.5)
    assert [curve.is_likely(hits, chance) for hits in (30, 41, 50, 59, 70)] == [False, True, True, True, False]
    assert curve.is_likely(0, np.full(10, 1e-6)) and not curve.is_likely(1, np.full(10, 1e-6))


def test_the_curve_finds_its_pairs(library: Library) -> None:
    bins = curve.measure(library, 100)
    assert [each.low for each in bins] == pytest.approx(np.linspace(0.2, 0.95, 16).tolist())
    assert sum(each.pairs for each in bins) >= 20
    assert bins[-1].hits == bins[-1].pairs
    assert bins[0].hits == 0


def test_packing_counts_what_is_cut() -> None:
    found = packing.measure([1500, 548, 1500, 600, 5000])
    assert found.cut == 0.0
    assert found.concat_cut == 0.25  # the second ends where its row ends; of the four that fit only the fourth is cut
    assert (found.documents, found.tokens, found.least_rows) == (5, 9148, 5)
    assert found.padding == pytest.approx(1 - 9148 / (found.rows * packing.SEQ_LEN))


def run(megabytes: float, wall_s: float, cpu_s: float) -> Run:
    return Run(megabytes, 100, [Watched(wall_s, cpu_s, 1)])


def test_the_line_is_drawn_to_another_size() -> None:
    assert reach([run(1, 7, 4), run(3, 17, 44)], 100) == pytest.approx(0.1)  # 40 CPU s on 2 cores: 10 s per MB
    assert reach([run(1, 7, 4), run(3, 17, 4)], 100) == pytest.approx(100 / 502)  # 2 s and 5 s per MB
    assert reach([run(1, 7, 4), run(3, 6, 8)], 100) == pytest.approx(100 / 106)  # less wall for more text: by CPU


def test_a_key_takes_time() -> None:
    assert 0 < cluster_key_s(2000) < 1e-3


def test_what_cannot_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def install(python: Path, pins: list[str], fixed: Sequence[str] = ()) -> str | None:
        asked.append((pins, fixed))
        return "ERROR: no wheel" if any(pin.startswith("rensa") for pin in pins) else None

    monkeypatch.setattr(peers, "_install", install)
    monkeypatch.setattr(peers, "_versions", lambda python, names: dict.fromkeys(names, "1"))
    monkeypatch.setattr(peers.venv.EnvBuilder, "create", lambda self, folder: folder.mkdir(parents=True))
    found = peers.ensure(tmp_path, PINS, ("numpy==2.4.6",))
    assert found.missing == {"rensa": "ERROR: no wheel"}
    assert set(found.versions) == set(PINS) - {"rensa"}
    count = len(asked)
    assert asked[0] == (["numpy==2.4.6"], ()) and {fixed for _, fixed in asked[1:]} == {("numpy==2.4.6",)}
    assert peers.ensure(tmp_path, PINS, ("numpy==2.4.6",)) == found
    assert len(asked) == count  # the second time it is there


def test_the_job_of_the_line_is_a_job(tmp_path: Path) -> None:
    source, tokenizer, job = tmp_path / "corpus", tmp_path / "tokenizer.json", tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_settings(source, tokenizer)))
    assert load_job(job).stages() == ["prepare", "tokenize"]
