"""The corpus maker: the same bytes for the same seed, a prefix of what is larger, and the promised kinds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.data import corpus
from benchmarks.data.corpus import Library, build, document, edit
from benchmarks.data.curve import shingles


def test_a_larger_corpus_begins_with_the_smaller_one(library: Library, tmp_path: Path) -> None:
    small = build(library, 0.1, tmp_path / "one")
    large = build(library, 4, tmp_path / "two")
    assert len(large) > len(small) == 1
    assert small[0].read_bytes() == large[0].read_bytes()
    assert sum(path.stat().st_size for path in large) >= 4e6
    assert build(library, 0.1, tmp_path / "three", seed=2)[0].read_bytes() != small[0].read_bytes()


def test_rows_are_documents_with_a_text(library: Library, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in build(library, 0.1, tmp_path)[0].read_text().splitlines()]
    assert len(rows) == corpus.SHARD_DOCUMENTS
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(isinstance(row["text"], str) for row in rows)


def test_the_kinds_have_their_shares(library: Library) -> None:
    kinds = Counter(document(number, library, 1)[0] for number in range(3000))
    shares = {kind: count / 3000 for kind, count in kinds.items()}
    assert shares == pytest.approx({"original": 0.77, "exact": 0.05, "near": 0.10, "junk": 0.08}, abs=0.02)


def test_an_exact_duplicate_is_an_earlier_original(library: Library) -> None:
    made = [document(number, library, 1) for number in range(300)]
    originals = {corpus._original(number, library, 1) for number in range(300)}
    copies = [text for kind, text in made if kind == "exact"]
    assert copies and all(text in originals for text in copies)


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9])
def test_an_edit_has_the_similarity_asked_for(library: Library, similarity: float) -> None:
    import random

    text = "\n".join(library.paragraphs)
    one, other = shingles(text), shingles(edit(text, similarity, random.Random(1), library))
    assert len(one & other) / len(one | other) == pytest.approx(similarity, abs=0.05)


def test_the_users_text_is_used_alone(tmp_path: Path) -> None:
    sentence = "A sentence of the user that is surely longer than sixty characters, number"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"{sentence} one.\nshort"}) + "\n")
    (tmp_path / "b.txt").write_text(f"{sentence} two.\n")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    found = Library.load(tmp_path / "cache", tmp_path)
    assert found.paragraphs == (f"{sentence} one.", f"{sentence} two.")


def test_a_folder_without_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--text"):
        Library.load(tmp_path / "cache", tmp_path)
