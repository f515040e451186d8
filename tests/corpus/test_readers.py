"""Files to documents; whatever a file holds, a record comes out or is quarantined; only a disk or store that fails is raised."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raymill.corpus import storage
from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import Source, SourceFile, list_files
from raymill.errors import DataError

ReadFile = Callable[..., list[Record]]
LINES = [json.dumps({"text": f"document {row}", "url": "x"}) for row in range(3)]
JSONL = "\n".join(LINES).encode() + b"\n"


def documents(records: list[Record]) -> list[tuple[str, str]]:
    return [(record.id, record.text) for record in records if isinstance(record, Document)]


def faults(records: list[Record]) -> list[tuple[str, int | None, int]]:
    return [(record.reason, record.row, record.offset) for record in records if isinstance(record, Unreadable)]


def test_py_is_one_document(read_file: ReadFile) -> None:
    (record,) = read_file("a.py", b"x = 1\n\n\ny = 2\n", segment_bytes=4)
    assert record == Document("a.py", "x = 1\n\n\ny = 2\n", "code", record.source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("rows.jsonl.gz", gzip.compress(JSONL)),
        ("rows.jsonl.gz", gzip.compress(JSONL[:20]) + gzip.compress(JSONL[20:]) + b"\0" * 9),
        ("rows.jsonl.zst", zstandard.compress(JSONL)),
        ("rows.jsonl.zst", zstandard.compress(JSONL[:20]) + zstandard.compress(JSONL[20:])),
        ("rows.jsonl", b"\xef\xbb\xbf" + JSONL.rstrip()),
        ("rows.jsonl", JSONL.replace(b"\n", b"\r\n")),
    ],
    ids=["plain", "gz", "gz of two members", "zst", "zst of two frames", "byte order mark", "CRLF"],
)
def test_jsonl_is_one_document_per_line(read_file: ReadFile, name: str, content: bytes) -> None:
    records = read_file(name, content)
    offsets = [int(record.id.removeprefix(f"{name}#")) for record in records if isinstance(record, Document)]
    unpacked = content if name == "rows.jsonl" else JSONL
    assert [text for _, text in documents(records)] == [f"document {row}" for row in range(3)]
    assert [unpacked[offset:].lstrip(b"\xef\xbb\xbf")[:8] for offset in offsets] == [b'{"text":'] * 3
    assert faults(records) == []


def test_another_text_field(read_file: ReadFile) -> None:
    assert documents(read_file("rows.jsonl", JSONL, text_field="url"))[0] == ("rows.jsonl#0", "x")


BAD_LINES = {
    "bad_json": [b"{", b'{"text": "cut', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": 1}}', b"NaN"],
    "not_an_object": [b"[]", b'"text"', b"3"],
    "no_text_field": [b"{}", b'{"Text": "x"}'],
    "text_not_a_string": [b'{"text": null}', b'{"text": ["x"]}'],
    "nul": [b'{"text": "a\\u0000b"}'],
    "too_long": [b'{"text": "' + b"x" * 3_000_000 + b'"}'],
}


@pytest.mark.parametrize(
    ("reason", "line"),
    [(reason, line) for reason, lines in BAD_LINES.items() for line in lines] + [("bad_json", b"[" * 100_000)],
    ids=lambda value: value if isinstance(value, str) else repr(value[:24]),
)
def test_a_bad_line_is_quarantined_and_the_next_is_read(read_file: ReadFile, reason: str, line: bytes) -> None:
    first = LINES[0].encode() + b"\n"
    records = read_file("rows.jsonl", first + line + b"\n\n" + LINES[2].encode())
    third = len(first) + len(line) + 2
    assert documents(records) == [("rows.jsonl#0", "document 0"), (f"rows.jsonl#{third}", "document 2")]
    assert faults(records) == [(reason, None, len(first))]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_cut_archive_loses_only_its_tail(read_file: ReadFile, packing: str) -> None:
    pack = gzip.compress if packing == "gz" else zstandard.compress
    lines = b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(200))
    records = read_file(f"rows.jsonl.{packing}", pack(lines[:50_000]) + pack(lines[50_000:])[:-20])
    assert len(documents(records)) >= lines[:50_000].count(b"\n")
    assert [reason for reason, _, _ in faults(records)] == ["damaged_archive"]


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08"], ids=["empty", "text", "head"])
def test_what_is_no_archive(read_file: ReadFile, packing: str, content: bytes) -> None:
    assert faults(read_file(f"a.txt.{packing}", content)) == [("damaged_archive", None, 0)]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_bomb_is_one_quarantined_record(read_file: ReadFile, packing: str) -> None:
    pack = gzip.compress if packing == "gz" else zstandard.compress
    records = read_file(f"a.txt.{packing}", pack(bytes(50_000_000)))
    assert faults(records) == [("too_long", None, 0)]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(read_file: ReadFile) -> None:
    content = b"".join(b"line %d\nof text\n\n" % number for number in range(400))
    records = read_file("book.txt", content, segment_bytes=1000)
    found = documents(records)
    assert "".join(text for _, text in found).encode() == content
    assert all(1000 <= len(text) < 1020 and text.endswith("\n\n") for _, text in found[:-1])
    starts = [sum(len(text) for _, text in found[:number]) for number in range(len(found))]
    assert [name for name, _ in found] == [f"book.txt#{start}" for start in starts]


def test_a_text_without_blank_lines_is_cut_at_a_line(read_file: ReadFile) -> None:
    found = documents(read_file("log.txt", b"0123456\n" * 1000, segment_bytes=1000))
    assert [len(text) for _, text in found] == [2000, 2000, 2000, 2000]


def test_a_short_text_keeps_its_name(read_file: ReadFile) -> None:
    assert documents(read_file("a.md", b"# Title\n\nText\n")) == [("a.md", "# Title\n\nText\n")]
    assert documents(read_file("a.txt", b"")) == [("a.txt", "")]


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [(b"abc\xffdef", "not_utf8", 3), (b"ab\xed\xa0\x80", "not_utf8", 2), (b"ab\0cd", "nul", 2)],
)
@pytest.mark.parametrize("ending", ["txt", "py"])
def test_text_that_is_no_text(read_file: ReadFile, content: bytes, reason: str, offset: int, ending: str) -> None:
    assert faults(read_file(f"a.{ending}", content)) == [(reason, None, offset)]


def test_only_the_segment_with_the_fault_is_lost(read_file: ReadFile) -> None:
    content = b"a" * 1000 + b"\n\n" + b"b" * 990 + b"\xff" + b"b" * 9 + b"\n\n" + b"c" * 50
    records = read_file("a.txt", content, segment_bytes=1000)
    assert [(name, text[0]) for name, text in documents(records)] == [("a.txt#0", "a"), ("a.txt#2004", "c")]
    assert faults(records) == [("not_utf8", None, 1992)]


def test_utf16_is_named(read_file: ReadFile) -> None:
    (record,) = read_file("a.txt", "hello".encode("utf-16"))
    assert isinstance(record, Unreadable)
    assert "UTF-16" in record.detail


def test_an_over_long_line_of_a_text(read_file: ReadFile) -> None:
    records = read_file("a.txt", b"good\n" + b"x" * 3_000_000 + b"\nalso good\n")
    assert documents(records) == [("a.txt#0", "good\n"), ("a.txt#3000006", "also good\n")]
    assert faults(records) == [("too_long", None, 5)]


def test_an_over_long_module(read_file: ReadFile) -> None:
    assert faults(read_file("a.py", b"x" * 1_048_577)) == [("too_long", None, 0)]


def test_topics_are_parsed_and_never_run(tmp_path: Path) -> None:
    from dataclasses import replace

    path = tmp_path / "topics.py"
    limits = ReadLimits(1000, 1000)
    for content, expected in (
        (
            "# made\ntopics = {'b': 'two ' 'parts', 'a': 'one'}\n",
            [("topics.py#a", "one"), ("topics.py#b", "two parts")],
        ),
        ("topics = {'a': open('x')}", ["bad_topics"]),
        ("topics = {", ["bad_topics"]),
    ):
        path.write_text(content)
        (file,) = list_files([Source(path=str(path))])
        records = list(read(replace(file, format="topics"), limits))
        assert (documents(records) or [reason for reason, _, _ in faults(records)]) == expected


def test_a_file_that_changed_since_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    (file,) = list_files([Source(path=str(path))])
    path.write_text("changed after")
    with pytest.raises(DataError, match="changed while it was read"):
        list(read(file, ReadLimits(1000, 1000)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(read_file: ReadFile, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch(mode=0)
    assert faults(read_file("a.txt", b"")) == [("unreadable", None, 0)]


class Failing:
    """An open file whose reads fail from one of them on."""

    def __init__(self, opened: Any, error: OSError, good_reads: int) -> None:
        self._opened, self._error, self._good_reads = opened, error, good_reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def read(self, *size: int) -> bytes:
        self._good_reads -= 1
        if self._good_reads < 0:
            raise self._error
        data: bytes = self._opened.read(*size)
        return data


def fail(monkeypatch: pytest.MonkeyPatch, error: OSError, good_reads: int = 0) -> None:
    opens, opens_arrow = storage.open_file, storage.open_arrow
    monkeypatch.setattr(storage, "open_file", lambda file: Failing(opens(file), error, good_reads))

    def open_arrow(file: SourceFile) -> pa.PythonFile:
        return pa.PythonFile(Failing(opens_arrow(file), error, good_reads), "r")

    monkeypatch.setattr(storage, "open_arrow", open_arrow)


def parquet_of(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {row}" for row in range(rows)]}), sink, row_group_size=2)
    return sink.getvalue()


WARC = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n"
EVERY_FORMAT = {
    "a.py": b"x = 1\n", "a.html": b"<p>Text", "a.txt": b"text\n", "a.md": b"text\n", "a.jsonl": JSONL, "a.json": JSONL,
    "a.csv": b"text\nx\n", "a.tsv": b"text\nx\n", "a.parquet": parquet_of(4), "a.warc": WARC,
    "a.warc.gz": gzip.compress(WARC) * 2, "a.warc.zst": zstandard.compress(WARC),
    "a.jsonl.gz": gzip.compress(JSONL), "a.txt.zst": zstandard.compress(JSONL),
}  # fmt: skip


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), TimeoutError(errno.ETIMEDOUT, "late"), OSError("AWS Error")]
)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_disk_or_store_that_fails_now_is_told(
    read_file: ReadFile, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    """Nothing is quarantined: the next attempt may read it all."""
    for good_reads in range(100):
        with monkeypatch.context() as patch:
            fail(patch, error, good_reads)
            try:
                records = read_file(name, EVERY_FORMAT[name])
            except OSError as raised:
                assert (type(raised), raised.errno, str(raised)) == (type(error), error.errno, str(error))
            else:
                assert good_reads > 0 and documents(records) and not faults(records)
                return
    pytest.fail("it never ends")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), IsADirectoryError(errno.EISDIR, "a folder")])
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_what_will_never_be_readable_is_quarantined(
    read_file: ReadFile, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    def refuse(file: SourceFile) -> Any:
        raise error

    monkeypatch.setattr(storage, "open_file", refuse)
    monkeypatch.setattr(storage, "open_arrow", refuse)
    assert [reason for reason, _, _ in faults(read_file(name, EVERY_FORMAT[name]))][:1] == ["unreadable"]


def test_damaged_parquet_is_no_failing_disk(read_file: ReadFile) -> None:
    content = parquet_of(4)
    for cut in (content[:-1], content[:4] + b"\xff" * 20 + content[24:], b"PAR1" + bytes(60) + b"PAR1"):
        assert "damaged_parquet" in [reason for reason, _, _ in faults(read_file("a.parquet", cut))]
