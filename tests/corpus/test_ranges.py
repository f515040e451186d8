"""A file cut into ranges gives the same documents as the whole file, wherever it was cut."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill.corpus.document import Document, Record
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import Source, group, list_files

LIMITS = ReadLimits(segment_bytes=300, max_document_bytes=4000)
Words = Callable[[random.Random, int], str]


def words(draw: random.Random, count: int) -> str:
    return " ".join(
        draw.choice(["river", "stone", "caf\xe9", "light", "under", "\u2014", "walks"]) for _ in range(count)
    )


def make_jsonl(draw: random.Random) -> bytes:
    lines = [json.dumps({"text": words(draw, draw.randint(1, 60))}).encode() for _ in range(80)]
    lines[10], lines[20], lines[30] = b"", b"{broken", b'{"text": "' + b"x" * 5000 + b'"}'
    return (b"\r\n" if draw.random() < 0.3 else b"\n").join(lines)


def make_text(draw: random.Random) -> bytes:
    pieces = []
    for _ in range(draw.randint(1, 120)):
        length = draw.choice([1, 5, 20, 60, 60, 900]) if draw.random() < 0.1 else draw.randint(1, 30)
        pieces.append(words(draw, length).encode() + draw.choice([b"\n", b"\n", b"\n\n", b"\n  \t\n", b"\n" * 40]))
    if draw.random() < 0.2:
        pieces.insert(draw.randrange(len(pieces)), b"y" * 30_000 + b"\n")  # longer than several blocks
    return b"".join(pieces)


def warc_record(draw: random.Random, number: int) -> bytes:
    kind = draw.choice(["conversion", "conversion", "request"])
    content = words(draw, draw.randint(0, 80)).encode()
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x/{number}\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content + b"\r\n\r\n"


def make_warc(draw: random.Random) -> bytes:
    return b"".join(warc_record(draw, number) for number in range(60))


def make_warc_gz(draw: random.Random) -> bytes:
    return b"".join(gzip.compress(warc_record(draw, number), mtime=0) for number in range(60))


def make_parquet(draw: random.Random) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": [words(draw, draw.randint(1, 30)) for _ in range(200)]})
    pq.write_table(table, sink, row_group_size=draw.randint(1, 40))
    return bytes(sink.getvalue())


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "a.jsonl": make_jsonl,
    "a.txt": make_text,
    "a.warc": make_warc,
    "a.warc.gz": make_warc_gz,
    "a.parquet": make_parquet,
}


def read_cut(path: Path, shard_bytes: int, limits: ReadLimits = LIMITS) -> list[Record]:
    shards = group(list_files([Source(path=str(path))]), shard_bytes)
    return [record for shard in shards for file in shard.files for record in read(file, limits)]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(6))
def test_every_cutting_gives_the_same_records(tmp_path: Path, name: str, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / name
    path.write_bytes(MAKERS[name](draw))
    whole = read_cut(path, 1 << 40)
    assert len(whole) > 2 or name == "a.txt"
    assert len({record.id for record in whole if hasattr(record, "id")}) == sum(hasattr(r, "id") for r in whole)
    for _ in range(6):
        assert read_cut(path, draw.randint(40, max(len(path.read_bytes()), 100))) == whole


@pytest.mark.parametrize("name", ["a.jsonl", "a.warc", "a.warc.gz"])
def test_every_single_byte_as_the_border_of_two_ranges(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(
        MAKERS[name](random.Random(5))[:700] if name != "a.jsonl" else b'{"text":"a"}\n\n{"text":"b"}\n{"text":"c"}'
    )
    (file,) = list_files([Source(path=str(path))])
    whole = list(read(file, LIMITS))
    for border in range(1, file.size_bytes):
        parts = (replace(file, stop=border), replace(file, start=border, stop=file.size_bytes))
        assert [record for part in parts for record in read(part, LIMITS)] == whole, border


@pytest.mark.parametrize("length", [*range(9_300, 9_700, 40), *range(9_590, 9_612), 9_900, 20_000])
def test_a_line_that_ends_near_the_beginning_of_a_block(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.txt"  # blocks begin at 4800, 9600, ...
    path.write_bytes(b"x" * length + b"\nshort\nlines\n\nand more\n" + b"of them\n" * 2000)
    limits = ReadLimits(300, 1 << 20)
    whole = read_cut(path, 1 << 40, limits)
    assert "".join(record.text for record in whole if isinstance(record, Document)) == path.read_text()
    for shard_bytes in (100, 4800, 5000, 9600):
        assert read_cut(path, shard_bytes, limits) == whole


def test_text_is_whole_after_any_cutting(tmp_path: Path) -> None:
    for seed in range(20):
        path = tmp_path / f"{seed}.txt"
        path.write_bytes(make_text(random.Random(seed)))
        found = "".join(
            record.text for record in read_cut(path, 333, ReadLimits(300, 1 << 20)) if hasattr(record, "text")
        )
        assert found.split() == path.read_text().split()
