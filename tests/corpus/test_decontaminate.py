"""Evaluation files in, matching grams out, against the same search over plain strings."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from raymill.corpus.decontaminate import Index, build_index, contaminated, load_index, save_index
from raymill.errors import DataError

QUESTION = "Natalia sold clips to forty-eight of her friends in April, and then she sold half as many clips in May!"
SHORT = "Which planet has the largest moon of all?"
WORDS = [f"word{number}" for number in range(40)]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def index(tmp_path: Path) -> Index:
    records = [{"question": QUESTION, "answer": {"choices": [SHORT, "yes or no"], "label": 3}}]
    return build_index([write(tmp_path / "eval.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")])


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        (QUESTION, 8),
        (f"Before it. {QUESTION.upper()} After it.", 8),
        (QUESTION.replace(" ", "\n\t"), 8),
        (QUESTION.replace(",", " -- "), 8),
        (" ".join(QUESTION.split()[:12]), 0),
        (" ".join(QUESTION.split()[3:16]), 1),
        (f"He asked: {SHORT}", 1),
        (SHORT.removesuffix(" all?"), 0),
        ("yes or no", 0),
        ("", 0),
    ],
    ids=[
        "whole",
        "case",
        "spaces",
        "marks",
        "12 words",
        "13 words",
        "short whole",
        "short in part",
        "too short",
        "none",
    ],
)
def test_hits(index: Index, text: str, hits: int) -> None:
    assert contaminated(text, index) == hits


def test_against_plain_strings(tmp_path: Path) -> None:
    draw = random.Random(2)
    strings = [" ".join(draw.choices(WORDS[:3], k=draw.randrange(1, 12))) for _ in range(60)]
    index = build_index([write(tmp_path / "eval.txt", "\n".join(strings))], ngram=9)
    grams = set()
    for string in strings:
        words = string.split()
        length = min(9, len(words))
        if length >= 8:
            grams |= {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
    for _ in range(300):
        words = draw.choices(WORDS[:3], k=60)
        expected = sum(tuple(words[at : at + length]) in grams for length in (8, 9) for at in range(61 - length))
        assert contaminated(" ".join(words), index) == expected


CONTENT = {
    "eval.jsonl": json.dumps({"a": {"b": [QUESTION]}}),
    "eval.json": json.dumps({"data": [{"text": QUESTION}]}),
    "eval.csv": f'id,text\n1,"{QUESTION}"\n',
    "eval.tsv": f"id\ttext\n1\t{QUESTION}\n",
    "eval.txt": f"\ufeff{QUESTION}\nother\n",
    "eval.jsonl.gz": json.dumps([QUESTION]),
    "eval.csv.gz": f'"{QUESTION}"',
}


@pytest.mark.parametrize("name", CONTENT)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    index = build_index([write(tmp_path / name, CONTENT[name])])
    assert contaminated(QUESTION, index) == 8


def test_an_index_on_disk_is_the_same(tmp_path: Path, index: Index) -> None:
    save_index(index, tmp_path / "index.npy")
    loaded = load_index(tmp_path / "index.npy")
    assert (loaded.ngram, loaded.grams.phrases) == (13, index.grams.phrases)
    assert contaminated(f"{QUESTION} {SHORT}", loaded) == 9
    assert not loaded.grams.slots.flags.owndata


def test_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{each}.txt", f"{each} {QUESTION} {each}") for each in ("one", "two")]
    for name, order in (("a", paths), ("b", paths[::-1])):
        save_index(build_index(order), tmp_path / f"{name}.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: the evaluation file cannot be read"),
        ("empty.jsonl", b"", "empty.jsonl: the evaluation file holds no text"),
        ("numbers.json", b"[1, 2]", "numbers.json: the evaluation file holds no text"),
        ("broken.jsonl", b'{"a": "b"}\n{"a": ', "broken.jsonl:2: the evaluation file is no JSON"),
        ("deep.json", b"[" * 100_000, "deep.json: the evaluation file is no JSON"),
        ("eval.parquet", b"PAR1", "eval.parquet: an evaluation file cannot be .parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError) as raised:
        build_index([path])
    assert message in str(raised.value)
    assert "hint:" in str(raised.value)


def test_a_damaged_gz(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(QUESTION.encode() * 100))
    data[10:20] = b"\xff" * 10  # no block of deflate begins so
    (tmp_path / "bad.txt.gz").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        build_index([tmp_path / "bad.txt.gz"])


def test_a_csv_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(20)
    monkeypatch.setattr(csv, "field_size_limit", lambda limit: 0)
    try:
        with pytest.raises(DataError, match=r"bad\.csv:2: the evaluation file is no csv"):
            build_index([write(tmp_path / "bad.csv", b"a,b\n" + b"x" * 30 + b",c\n")])
    finally:
        monkeypatch.undo()
        csv.field_size_limit(before)


def test_a_cut_gz(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress(QUESTION.encode() * 100)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        build_index([path])
