"""Each format's records become documents; the same columns make the same document in every format that has columns."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raymill.corpus import html
from raymill.corpus.document import Document, Part, Record, Unreadable
from raymill.corpus.templates import Template

ReadFile = Callable[..., list[Record]]
ROWS = [{"text": f"text {row}", "label": row % 2, "url": f"u{row}"} for row in range(4)]


def texts(records: list[Record]) -> list[str]:
    return [record.text for record in records if isinstance(record, Document)]


def reasons(records: list[Record]) -> list[str]:
    return [record.reason for record in records if isinstance(record, Unreadable)]


def parquet(columns: dict[str, object], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def csv_of(rows: list[dict[str, object]], comma: str = ",") -> bytes:
    lines = [comma.join(rows[0]), *(comma.join(str(value) for value in row.values()) for row in rows)]
    return "\n".join(lines).encode() + b"\n"


FILES = {
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.csv": csv_of(ROWS),
    "a.tsv": csv_of(ROWS, "\t"),
    "a.parquet": parquet({key: [row[key] for row in ROWS] for key in ROWS[0]}, row_group_size=2),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.zst": zstandard.compress(csv_of(ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_records_with_columns_agree_in_every_format(read_file: ReadFile, name: str) -> None:
    records = read_file(name, FILES[name], keep=("url", "label", "none"))
    assert [(r.text, r.columns, r.source, r.kind) for r in records if isinstance(r, Document)] == [
        (row["text"], {"url": row["url"], "label": str(row["label"])}, name[0], "prose") for row in ROWS
    ]
    assert len({record.id for record in records if isinstance(record, Document)}) == len(records) == 4


@pytest.mark.parametrize("name", FILES)
def test_a_template_makes_a_task_in_every_format(read_file: ReadFile, name: str) -> None:
    template = Template(prompt="Say {text}:", completion=" {label}", labels={"label": {0: "even", 1: "odd"}})
    records = read_file(name, FILES[name], template=template)
    documents = [record for record in records if isinstance(record, Document)]
    assert documents[1].parts == (Part("Say text 1:", None, False), Part(" odd", None, True))
    assert [(each.kind, each.text) for each in documents] == [
        ("task", f"Say text {row}: {('even', 'odd')[row % 2]}") for row in range(4)
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_column_is_quarantined(read_file: ReadFile, name: str) -> None:
    assert (
        reasons(read_file(name, FILES[name], template=Template(prompt="{text}", completion="{answer}")))
        == ["missing_column"] * 4
    )
    lacking = reasons(read_file(name, FILES[name], text_field="body"))
    assert lacking == ["no_text_field"] * (1 if name == "a.parquet" else 4)


def test_csv_fields_may_hold_line_ends_commas_and_quotes(read_file: ReadFile) -> None:
    content = b'\xef\xbb\xbfid,text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,d\r\n'
    records = read_file("a.csv", content)
    assert texts(records) == ['a, "b"\r\nc', "d"]
    assert [record.id for record in records if isinstance(record, Document)] == ["a.csv#12", "a.csv#31"]


def test_parquet_ids_are_rows_of_the_file(read_file: ReadFile) -> None:
    records = read_file("a.parquet", FILES["a.parquet"])
    assert [record.id for record in records if isinstance(record, Document)] == [f"a.parquet#{row}" for row in range(4)]


def test_json_values_end_where_their_brackets_do(read_file: ReadFile) -> None:
    odd = ['one " and }', 'br]ack}et "quoted" \\', "\\\\", '{"text": "inner"}', "\u00e9\n" * 40_000]
    content = json.dumps([{"text": text, "more": [{"a": [1]}]} for text in odd])
    assert texts(read_file("a.json", content.encode())) == odd


def test_json_reads_on_after_what_is_no_record(read_file: ReadFile) -> None:
    content = (
        b'[{"text": "a"}, 3, "s", null, {"text": }, {"text": "'
        + b"x" * 2_000_000
        + b'"}, [1, {"text": "no"}], {"text": "b"}]'
    )
    records = read_file("a.json", content)
    assert texts(records) == ["a", "b"]
    assert reasons(records) == ["not_an_object"] * 3 + ["bad_json", "too_long", "not_an_object"]


CHAT = {
    "messages": {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
    "conversations": {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", CHAT)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_a_conversation_is_learned_where_the_assistant_speaks(read_file: ReadFile, shape: str, form: str) -> None:
    row = CHAT[shape]
    content = parquet({shape: [row[shape]], "text": ["x"]}) if form == "parquet" else json.dumps(row).encode()
    (document,) = read_file(f"a.{form}", content)
    assert isinstance(document, Document)
    assert (document.kind, document.text) == ("chat", "SUA")
    assert document.parts == (Part("S", "system", False), Part("U", "user", False), Part("A", "assistant", True))


TOOLS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "far?"}]},
        {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3 miles"},
    ],
    "conversations": [
        {"from": "human", "value": "How far?"}, {"from": "function_call", "value": "f()"},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "3 miles"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("shape", TOOLS)
def test_what_a_tool_says_is_given_and_its_call_is_learned(read_file: ReadFile, shape: str) -> None:
    said = [
        ("How far?", "user", False),
        ("f()", "assistant", True),
        ("3", "tool", False),
        ("3 miles", "assistant", True),
    ]
    (document,) = read_file("a.jsonl", json.dumps({shape: TOOLS[shape]}).encode())
    assert isinstance(document, Document)
    assert [(part.text, part.role, part.learn) for part in document.parts] == said
    function = json.dumps({shape: TOOLS[shape]}).replace('"tool"', '"function"').replace('"observation"', '"function"')
    assert texts(read_file("b.jsonl", function.encode())) == ["How far?f()33 miles"]


def test_pieces_of_a_turn_in_parquet(read_file: ReadFile) -> None:
    turns = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert texts(read_file("a.parquet", parquet({"messages": [turns]}))) == ["ab"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_null_conversation_beside_a_text(read_file: ReadFile, form: str) -> None:
    turns = [{"role": "assistant", "content": "A"}]
    rows = [{"messages": None, "text": "plain"}, {"messages": turns, "text": "x"}, {"messages": None, "text": None}]
    table = {name: [row[name] for row in rows] for name in ("messages", "text")}
    content = parquet(table) if form == "parquet" else "\n".join(map(json.dumps, rows)).encode()
    records = read_file(f"a.{form}", content)
    assert texts(records) == ["plain", "A"]
    assert reasons(records) == ["no_turns"]
    assert [record.kind for record in records if isinstance(record, Document)] == ["prose", "chat"]


def test_a_page_is_its_main_content(read_file: ReadFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "extract", lambda page, extractor: f"{extractor} {len(page)}")
    assert texts(read_file("a.html.gz", gzip.compress(b"<p>Hi"), html="trafilatura")) == ["trafilatura 5"]


def warc_record(kind: str, content: bytes, **headers: str) -> bytes:
    lines = [f"WARC-Type: {kind}", "WARC-Target-URI: http://example.com/a", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("WARC/1.0\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + content + b"\r\n\r\n"


def response(body: bytes, *headers: str) -> bytes:
    return ("HTTP/1.1 200 OK\r\n" + "".join(f"{header}\r\n" for header in headers) + "\r\n").encode() + body


PAGE = b"<html><body><article><p>The one paragraph of this page is long enough to be kept.</p></article></body></html>"
RESPONSES = {
    "plain": response(PAGE, "Content-Type: text/html; charset=utf-8"),
    "gzip": response(gzip.compress(PAGE), "Content-Type: text/html", "Content-Encoding: gzip"),
    "gzip already undone": response(PAGE, "Content-Type: text/html", "Content-Encoding: gzip"),
    "chunked": response(b"%x\r\n" % len(PAGE) + PAGE + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "chunked already joined": response(PAGE, "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("shape", RESPONSES)
def test_archived_pages(read_file: ReadFile, packing: str, shape: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    records = [
        warc_record("warcinfo", b"software: x\r\n"),
        warc_record("request", b"GET / HTTP/1.1\r\n\r\n"),
        warc_record("response", RESPONSES[shape]),
        warc_record("response", response(b"\x89PNG\0", "Content-Type: image/png")),
        warc_record("conversion", "caf\u00e9".encode()),
    ]
    found = read_file(f"a.warc{packing}", b"".join(map(pack, records)), keep=("url",))
    assert texts(found) == ["The one paragraph of this page is long enough to be kept.", "caf\u00e9"]
    assert reasons(found) == []
    assert all(r.columns == {"url": "http://example.com/a"} for r in found if isinstance(r, Document))
    starts = [len(b"".join(map(pack, records[:number]))) for number in (2, 4)]
    if packing != ".zst":
        assert [r.id for r in found if isinstance(r, Document)] == [f"a.warc{packing}#{start}" for start in starts]


def test_several_records_in_one_member(read_file: ReadFile) -> None:
    first = warc_record("conversion", b"one")
    found = read_file("a.warc.gz", gzip.compress(first + warc_record("conversion", b"two")))
    assert [(r.id, r.text) for r in found if isinstance(r, Document)] == [
        ("a.warc.gz#0", "one"),
        (f"a.warc.gz#0+{len(first)}", "two"),
    ]
