"""Hostile inputs: never a crash or a hang; what is bad is told with its file, offset and reason, what is good survives."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.readers import ReadLimits, read
from raymill.corpus.sources import Source, group, list_files
from raymill.errors import DataError, RaymillError, UsageError

ReadFile = Callable[..., list[Record]]
GOOD = b'{"text": "good"}\n'
LIMIT = 1 << 20


def line(text: bytes) -> bytes:
    """A jsonl file with a line between two good ones."""
    return GOOD + text + b"\n" + GOOD


def table(columns: dict[str, object], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def warc(content: bytes, length: object = None, kind: str = "conversion", first: bytes = b"WARC/1.0\r\n") -> bytes:
    length = len(content) if length is None else length
    return first + f"WARC-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode() + content + b"\r\n\r\n"


def page(encoding: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200\r\nContent-Encoding: {encoding}\r\n\r\n".encode()
    return warc(head + body, kind="response")


def chat(**record: object) -> bytes:
    return line(json.dumps(record).encode())


def endless_gz(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


WARC_GOOD = warc(b"good")
WARC_GZ = gzip.compress(WARC_GOOD)
TABLE = table(
    {"text": ["good"] * 50}, row_group_size=10, compression="none", use_dictionary=False, write_statistics=False
)
CHAT_GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}]
DEEP = 100_000
RAGGED = ["ragged_row"] * 400_000

CASES: dict[str, tuple[str, bytes, int, list[str]]] = {
    # name: (file, content, good documents, reasons of the bad)
    "gz cut": ("a.jsonl.gz", gzip.compress(GOOD) + gzip.compress(GOOD)[:-6], 2, ["damaged_archive"]),
    "zst cut": ("a.jsonl.zst", zstandard.compress(GOOD) + zstandard.compress(GOOD)[:-3], 1, ["damaged_archive"]),
    "gz with a wrong checksum": ("a.jsonl.gz", flip(gzip.compress(GOOD), len(gzip.compress(GOOD)) - 6), 0, ["damaged_archive"]),
    "gz that is none": ("a.csv.gz", b"text\ngood\n", 0, ["damaged_archive", "bad_header"]),
    "zst that is none": ("a.html.zst", b"<p>", 0, ["damaged_archive"]),
    "0 bytes jsonl": ("a.jsonl", b"", 0, []),
    "0 bytes gz": ("a.jsonl.gz", b"", 0, ["damaged_archive"]),
    "0 bytes parquet": ("a.parquet", b"", 0, ["damaged_parquet"]),
    "0 bytes csv": ("a.csv", b"", 0, []),
    "0 bytes json": ("a.json", b"", 0, []),
    "0 bytes warc": ("a.warc", b"", 0, []),
    "0 bytes warc.gz": ("a.warc.gz", b"", 0, ["damaged_archive"]),
    "a line over the limit": ("a.jsonl", line(b'{"text": "' + b"x" * (8 << 20) + b'"}'), 2, ["too_long"]),
    "a line over the limit, txt": ("a.txt", b"good\n" + b"x" * (8 << 20) + b"\ngood\n", 2, ["too_long"]),
    "gzip bomb": ("a.jsonl.gz", endless_gz(128 << 20), 0, ["too_long"]),
    "gzip bomb, warc": ("a.warc.gz", gzip.compress(WARC_GOOD) + endless_gz(64 << 20), 1, ["bad_warc"]),
    "gzip bomb in a page": ("a.warc", page("gzip", endless_gz(64 << 20)) + WARC_GOOD, 1, ["too_long"]),
    "zstd bomb": ("a.json.zst", zstandard.compress(b"[" + b" " * (128 << 20)), 0, []),
    "zstd bomb, code": ("a.py.zst", zstandard.compress(bytes(128 << 20)), 0, ["too_long"]),
    "deep JSON": ("a.jsonl", line(b"[" * DEEP + b"]" * DEEP), 2, ["bad_json"]),
    "deep JSON in a record": ("a.jsonl", line(b'{"text": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"), 2, ["bad_json"]),
    "deep JSON array": ("a.json", b'[{"text": "good"}, ' + b"[" * DEEP + b"]" * DEEP + b', {"text": "good"}]', 2, ["bad_json"]),
    "invalid UTF-8": ("a.jsonl", line(b'{"text": "\xff\xfe"}'), 2, ["bad_json"]),
    "invalid UTF-8, csv": ("a.csv", b"text\ngood\n\xff\ngood\n", 2, ["not_utf8"]),
    "lone surrogate": ("a.jsonl", line(b'{"text": "\\ud800"}'), 2, ["bad_json"]),
    "lone surrogate, raw": ("a.txt", b"\xed\xa0\x80", 0, ["not_utf8"]),
    "NUL": ("a.jsonl", line(b'{"text": "a\\u0000b"}'), 2, ["nul"]),
    "NUL, raw in a line": ("a.jsonl", line(b'{"text": "a\0b"}'), 2, ["bad_json"]),
    "NUL, csv": ("a.csv", b"text\ngood\na\0b\ngood\n", 2, ["nul"]),
    "NUL in code": ("a.c", b"int a;\0", 0, ["nul"]),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD * 2, 2, []),
    "byte order mark, json": ("a.json", b'\xef\xbb\xbf[{"text": "good"}]', 1, []),
    "UTF-16": ("a.csv", "text\ngood\n".encode("utf-16"), 0, ["not_utf8", "bad_header"]),
    "CRLF": ("a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, 2, []),
    "old Mac line ends": ("a.csv", b"text\rgood\r", 0, ["bad_csv", "bad_header"]),
    "zero-width joiners": ("a.jsonl", '{"text": "good\u200d\u200d"}'.encode(), 1, []),
    "a literal end of text": ("a.jsonl", b'{"text": "good<|endoftext|>good"}', 1, []),
    "JSON NaN": ("a.jsonl", line(b'{"text": NaN}'), 2, ["bad_json"]),
    "JSON number": ("a.jsonl", line(b"1e999"), 2, ["bad_json"]),
    "duplicate keys": ("a.jsonl", b'{"text": "bad", "text": "good"}', 1, []),
    "wrong types": ("a.jsonl", line(b'{"text": {"text": 1}}'), 2, ["text_not_a_string"]),
    "huge integer": ("a.jsonl", line(b'{"text": ' + b"9" * 5000 + b"}"), 2, ["bad_json"]),
    "trailing garbage": ("a.jsonl", line(b'{"text": "x"} {"text": "y"}'), 2, ["bad_json"]),
    "JSON never closed": ("a.json", b'[{"text": "good"}, {"text": "cut', 1, ["bad_json"]),
    "JSON of closing brackets": ("a.json", b"]}" * 3 + b'{"text": "good"}', 1, ["bad_json"] * 6),
    "csv open quote": ("a.csv", b'text\ngood\n"open\n' + b"good\n" * 3, 4, ["open_quote"]),
    "csv open quote past the limit": ("a.csv", b'text\n"open\n' + b"x,\n" * 400_000 + b"good\n", 1, ["open_quote", *RAGGED]),
    "csv quotes that all open": ("a.csv", b'text\n' + b'x","\n' * 400_000 + b"good\n", 0, ["open_quote"] * 18),
    "csv ragged rows": ("a.csv", b"a,text\n1\n1,good\n1,2,3\n", 1, ["ragged_row"] * 2),
    "csv of a header": ("a.csv", b"text\n", 0, []),
    "csv field over the module's limit": ("a.csv", b"text\ngood" + b"x" * 500_000 + b"\n", 1, []),
    "parquet cut": ("a.parquet", TABLE[:-20], 0, ["damaged_parquet"]),
    "parquet with a broken page": ("a.parquet", TABLE[:4] + b"\xff" * 12 + TABLE[16:], 40, ["damaged_parquet"]),
    "parquet with numbers for text": ("a.parquet", table({"text": [1, 2]}), 0, ["text_not_a_string"] * 2),
    "parquet nested": ("a.parquet", table({"text": [{"a": "x"}]}), 0, ["text_not_a_string"]),
    "parquet with missing values": ("a.parquet", table({"text": ["good", None]}), 1, ["text_not_a_string"]),
    "parquet of no rows": ("a.parquet", table({"text": pa.array([], pa.string())}), 0, []),
    "parquet of bytes that are no UTF-8": ("a.parquet", TABLE.replace(b"good", b"g\xffod", 1), 49, ["not_utf8"]),
    "parquet encrypted": ("a.parquet", b"PARE" + TABLE[4:-4] + b"PARE", 0, ["damaged_parquet"]),
    "parquet that claims 2 GB of metadata": ("a.parquet", TABLE[:-8] + struct.pack("<I", 1 << 31) + b"PAR1", 0, ["damaged_parquet"]),
    "html of 10,000 nested tags": ("a.html", b"<div>" * 10_000 + b"<p>good text that is kept</p>", 1, []),
    "html with broken entities": ("a.html", b"<body><p>good &#xffffffff; &; &#0; text</p>", 1, []),
    "html without a body": ("a.html", b"<html><head><title>x</title></head>", 1, []),
    "html of a wrong charset": ("a.html", b'<meta charset="utf-16"><p>caf\xe9 good text</p>', 1, []),
    "binary named html": ("a.html", random.Random(1).randbytes(50_000), 1, []),
    "0 bytes html": ("a.html", b"", 1, []),
    "warc with a length too long": ("a.warc", WARC_GOOD + warc(b"x", 10**12) + WARC_GOOD, 2, ["bad_length"]),
    "warc that swallows the next": ("a.warc", WARC_GOOD + warc(b"x", 60) + WARC_GOOD * 2, 3, ["bad_length"]),
    "warc with a length too short": ("a.warc", WARC_GOOD + warc(b"x" * 50, 10) + WARC_GOOD, 2, ["bad_length"]),
    "warc with a negative length": ("a.warc", warc(b"x", -1) + WARC_GOOD, 1, ["bad_warc"]),
    "warc without a length": ("a.warc", b"WARC/1.0\r\nWARC-Type: response\r\n\r\n" + WARC_GOOD, 1, ["bad_warc"]),
    "warc with endless headers": ("a.warc", WARC_GOOD + b"WARC/1.0\r\n" + b"A: b\r\n" * 200_000 + WARC_GOOD, 2, ["bad_warc"]),
    "warc of lies": ("a.warc", warc(b"", 3000) * 3000 + WARC_GOOD, 1, ["bad_length"] * 3000),
    "warc cut": ("a.warc", WARC_GOOD + WARC_GOOD[:-6], 1, ["bad_length"]),
    "warc that is none": ("a.warc", b"hello\n" * 50_000 + WARC_GOOD, 1, ["bad_warc"]),
    "warc without HTTP": ("a.warc", warc(b"no http", None, "response") + WARC_GOOD, 1, ["bad_http"]),
    "warc of an unknown packing": ("a.warc", page("br", b"x"), 0, ["http_encoding"]),
    "warc.gz with a damaged member": ("a.warc.gz", WARC_GZ + WARC_GZ[:40] + WARC_GZ, 2, ["damaged_archive"]),
    "warc.gz cut": ("a.warc.gz", gzip.compress(WARC_GOOD) + gzip.compress(WARC_GOOD)[:30], 1, ["damaged_archive"]),
    "chat without content": ("a.jsonl", chat(messages=[{"role": "user"}]), 2, ["bad_turn"]),
    "chat with null": ("a.jsonl", chat(messages=[{"role": "assistant", "content": None}]), 2, ["bad_turn"]),
    "chat of a call without text": ("a.jsonl", chat(messages=[{"role": "assistant", "content": None, "tool_calls": []}]), 2, ["bad_turn"]),
    "chat with a picture": ("a.jsonl", chat(messages=[*CHAT_GOOD, {"role": "user", "content": [{"type": "image_url"}]}]), 2, ["bad_turn"]),
    "chat with a null piece": ("a.jsonl", chat(messages=[{"role": "user", "content": [{"type": "text", "text": None}]}]), 2, ["bad_turn"]),
    "chat with pieces of no kind": ("a.jsonl", chat(messages=[{"role": "user", "content": [{"type": ["x"]}, "x"]}]), 2, ["bad_turn"]),
    "chat of an unknown role": ("a.jsonl", chat(messages=[*CHAT_GOOD, {"role": "root", "content": "x"}]), 2, ["unknown_role"]),
    "chat of a role that is a list": ("a.jsonl", chat(conversations=[{"from": ["user"], "value": "x"}]), 2, ["unknown_role"]),
    "chat of no turn": ("a.jsonl", chat(messages=[]), 2, ["no_turns"]),
    "chat that is no list": ("a.jsonl", chat(messages="hello"), 2, ["no_turns"]),
    "chat of turns that are text": ("a.jsonl", chat(messages=["hello"]), 2, ["bad_turn"]),
    "chat in which nobody answers": ("a.jsonl", chat(messages=CHAT_GOOD[:1]), 2, ["no_answer"]),
}  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_hostile_input(read_file: ReadFile, case: str) -> None:
    name, content, good, reasons = CASES[case]
    begin = perf_counter()
    records = read_file(name, content)
    assert perf_counter() - begin < 20
    bad = [record for record in records if isinstance(record, Unreadable)]
    assert [record.reason for record in bad] == reasons
    assert all(record.file == name and record.offset >= 0 and record.detail for record in bad)
    documents = [record for record in records if isinstance(record, Document)]
    assert len(documents) == good
    if not name.endswith("html"):
        assert all("good" in document.text for document in documents)


VALID = {
    "a.jsonl": GOOD * 40,
    "a.json": b"[" + b",".join([GOOD] * 40) + b"]",
    "a.csv": b"id,text\n" + b'1,"good, text"\n' * 40,
    "a.txt": b"good text\n\n" * 60,
    "a.html": b"<html><body><article>" + b"<p>good text of a page</p>" * 30 + b"</article></body></html>",
    "a.parquet": TABLE,
    "a.warc": WARC_GOOD * 20,
    "a.warc.gz": gzip.compress(WARC_GOOD) * 20,
    "a.jsonl.gz": gzip.compress(GOOD * 40),
    "a.jsonl.zst": zstandard.compress(GOOD * 40),
    "chat.jsonl": json.dumps({"messages": CHAT_GOOD}).encode() * 1 + b"\n",
}


@pytest.mark.parametrize("name", VALID)
def test_flipped_bytes(tmp_path: Path, name: str) -> None:
    """Bytes flipped, inserted and cut anywhere: every record is a document or told, whole and in ranges."""
    path = tmp_path / name
    limits = ReadLimits(1000, LIMIT)
    for seed in range(60):
        draw = random.Random(f"{name}{seed}")
        data = bytearray(VALID[name])
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data))
            change = draw.choice(["flip", "flip", "flip", "insert", "delete", "cut"])
            if change == "flip":
                data[at] = draw.randrange(256)
            elif change == "insert":
                data[at:at] = draw.randbytes(draw.randint(1, 9))
            elif change == "delete":
                del data[at : at + draw.randint(1, 9)]
            else:
                del data[max(at, 1) :]
            data = data or bytearray(b"\0")
        path.write_bytes(data)
        files = list_files([Source(path=str(path))])
        for shard_bytes in (1 << 30, 200):
            for shard in group(files, shard_bytes):
                for file in shard.files:
                    for record in read(file, limits):
                        assert isinstance(record, (Document, Unreadable))
                        if isinstance(record, Document):
                            record.text.encode()
                            assert "\0" not in record.text
                        else:
                            json.dumps(record.detail).encode()


def test_a_damaged_line_never_takes_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for seed in range(30):
        draw = random.Random(seed)
        lines = [b'{"text": "%d"}' % number for number in range(50)]
        broken = draw.randrange(50)
        lines[broken] = bytes(byte for byte in draw.randbytes(12) if byte != 10)
        path.write_bytes(b"\n".join(lines))
        (file,) = list_files([Source(path=str(path))])
        texts = [record.text for record in read(file, ReadLimits(1000, LIMIT)) if isinstance(record, Document)]
        assert set(texts) >= {str(number) for number in range(50) if number != broken}


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match="holds no text"):
        list_files([Source(path=str(tmp_path))])
    (tmp_path / "a.txt").write_text("good")
    assert [file.name for file in list_files([Source(path=str(tmp_path))])] == ["a.txt"]
    assert [file.name for file in list_files([Source(path=str(tmp_path / "*.txt"))])] == ["a.txt"]
    for name in ("pipe.txt", "loop.txt", "gone.txt"):
        with pytest.raises(UsageError, match="no file or folder"):
            list_files([Source(path=str(tmp_path / name))])


def test_a_file_that_became_a_pipe_or_vanished(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for change in (lambda: os.mkfifo(path), lambda: None):
        path.write_bytes(GOOD)
        (file,) = list_files([Source(path=str(path))])
        path.unlink()
        change()
        with pytest.raises(RaymillError, match="changed while it was read"):
            list(read(file, ReadLimits(1000, LIMIT)))
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json", "a.warc", "a.warc.gz", "a.html", "a.py"])
def test_an_input_that_changes_while_it_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(VALID.get(name, GOOD))
    (file,) = list_files([Source(path=str(path))])
    records = read(file, ReadLimits(1000, LIMIT))
    next(records)
    path.write_bytes(VALID.get(name, GOOD) + b"more")
    with pytest.raises(DataError, match="changed while it was read"):
        list(records)
