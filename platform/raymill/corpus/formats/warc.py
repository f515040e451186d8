"""warc: archived web. One document per response (the page's main content) and per conversion record (its text).

A range of a plain file owns the records that begin in it, found by their first line behind a blank one; a range of a
.warc.gz owns the members that begin in it. Other records (requests, metadata, pictures) are no text and are passed over.
One that lies about its length, or is damaged, is lost alone: reading goes on at the next first line or member. Of a
.warc.gz, offsets and ids are those of the members in the file as it is stored, which no cutting changes. `keep` may name
url, date and any header in lower case. Memory: one record. Costs: pages what their extractor takes, other text 290 MB/s, 85 in .gz.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.formats.http import parse_headers, parse_response
from raymill.corpus.formats.members import Members
from raymill.corpus.formats.stream import ByteStream
from raymill.corpus.formats.text import decode
from raymill.corpus.formats.unpack import REFUSALS, BrokenFileError, chunks
from raymill.corpus.formats.whole import page_to_document
from raymill.corpus.limits import ReadLimits, RecordError
from raymill.corpus.sources import SourceFile

_HEADER_BYTES = 64 << 10
_FIRST_LINE = re.compile(rb"(?:\A|(?<=\n))WARC/[01]\.\d{1,2}\r?\n")
_BEHIND_BLANK = re.compile(rb"(?:(?<=\n\r\n)|(?<=\n\n))WARC/[01]\.\d{1,2}\r?\n")
_LOOK_BACK = 3  # bytes before a first line that tell whether it is behind a blank one
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_TEXT = re.compile(rb"[^\r\n]")
_HTML_TYPES = ("text/html", "application/xhtml+xml", "")


@dataclass(frozen=True)
class _Head:
    """What stands before a record's content."""

    offset: int
    content_offset: int
    headers: Mapping[str, str]
    length: int


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every document whose record begins in the file's range."""
    try:
        if file.packing == "gz":
            yield from _read_members(file, limits)
        elif file.packing == "zst":
            yield from _read_records(file, limits, ByteStream(chunks(file), 0), str, None)
        else:
            begin = max(file.start - _LOOK_BACK, 0)
            stream = ByteStream(chunks(file, begin), begin, file.size_bytes, lambda offset: chunks(file, offset))
            if file.start == 0 or stream.find(_BEHIND_BLANK, file.stop):
                yield from _read_records(file, limits, stream, str, file.stop)
    except (BrokenFileError, *REFUSALS) as error:
        detail = error.detail if isinstance(error, BrokenFileError) else error.strerror or str(error)[:200]
        yield Unreadable(file.name, None, file.start, "unreadable", detail)


def _read_members(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    members = Members(file, b"WARC/")
    try:
        for begin in members:
            stream = ByteStream(members.read(begin), 0)
            name = f"{begin}+{{}}".format
            for record in _read_records(file, limits, stream, name, None):
                # One record per member is the rule; the first is named after the member alone.
                if isinstance(record, Document):
                    yield replace(record, id=record.id.removesuffix("+0"))
                else:
                    yield replace(record, offset=begin)
        if file.size_bytes == 0:
            yield Unreadable(file.name, None, 0, "damaged_archive", "it ends too early")
    finally:
        members.close()


def _read_records(
    file: SourceFile, limits: ReadLimits, stream: ByteStream, name: Callable[[int], str], stop: int | None
) -> Iterator[Record]:
    """Every document of a stream; `name` makes the end of an id of a record's offset."""
    try:
        while stream.find(_TEXT, stop):
            offset = stream.offset
            try:
                head = _read_head(stream)
                content = _read_content(stream, head, limits)
                if content is not None:
                    yield from _to_documents(file, limits, head, content, f"{file.name}#{name(offset)}")
            except RecordError as error:
                yield Unreadable(file.name, None, offset, error.reason, error.detail)
    except BrokenFileError as error:
        yield Unreadable(file.name, None, stream.offset, error.reason, error.detail)


def _read_head(stream: ByteStream) -> _Head:
    """Raises RecordError, with the stream at the next first line, when none is here."""
    offset = stream.offset
    if _FIRST_LINE.match(stream.peek(16)) is None:
        stream.find(_FIRST_LINE)
        raise RecordError("bad_warc", "no WARC record begins here")
    window = stream.peek(4096)
    end = _HEADER_END.search(window) or _HEADER_END.search(window := stream.peek(_HEADER_BYTES))
    if end is None:
        stream.skip(1)
        stream.find(_FIRST_LINE)
        raise RecordError("bad_warc", f"its headers do not end within {_HEADER_BYTES:,} bytes")
    stream.skip(end.end())
    headers = parse_headers(window[: end.start()])
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        stream.find(_FIRST_LINE)
        raise RecordError("bad_warc", f"its Content-Length is {length[:60]!r}")
    return _Head(offset, stream.offset, headers, int(length))


def _read_content(stream: ByteStream, head: _Head, limits: ReadLimits) -> bytes | None:
    """A record's content; None if its kind holds no text. Raises RecordError, with the stream at the next first line."""
    wanted = head.headers.get("warc-type", "").lower() in ("response", "conversion")
    taken: bytes | None = None
    if stream.end is not None and head.length > stream.end - stream.offset:
        taken, found = b"", 0  # nothing need be read to see the lie
    elif head.length <= limits.max_document_bytes:
        taken = stream.take(head.length)
        found = len(taken)
    else:
        found = stream.skip(head.length)
    following = stream.peek(16)
    if found == head.length and (not following.strip() or _FIRST_LINE.match(following.lstrip(b"\r\n"))):
        if wanted and taken is None:
            raise RecordError("too_long", f"{head.length:,} bytes, over {limits.max_document_bytes:,}")
        return taken if wanted else None
    stream.back(head.content_offset, taken)
    stream.find(_FIRST_LINE)
    raise RecordError("bad_length", f"its Content-Length {head.length:,} does not lead to the next record")


def _to_documents(
    file: SourceFile, limits: ReadLimits, head: _Head, content: bytes, document_id: str
) -> Iterator[Record]:
    record: Record
    if head.headers.get("warc-type", "").lower() == "conversion":
        record = decode(file, document_id, head.offset, content)
    else:
        response = parse_response(content, limits.max_document_bytes)
        if response.media_type in _HTML_TYPES:
            record = page_to_document(file, limits, document_id, head.offset, response.body)
        elif response.media_type == "text/plain":
            record = decode(file, document_id, head.offset, response.body)
        else:
            return
    keep = file.settings.keep
    if keep and isinstance(record, Document):
        known = {"url": head.headers.get("warc-target-uri"), "date": head.headers.get("warc-date"), **head.headers}
        record = replace(record, columns={name: value for name in keep if (value := known.get(name)) is not None})
    yield record
