"""A file to its documents, one at a time; what cannot be read comes out as a quarantine record, never as a crash.

    py                 one document per file
    txt, md            one document per file; a long file is cut at blank lines into documents of about `segment_bytes`
    jsonl              one document per line, from the field `text_field`
    topics             pydoc's table of Python's language documentation, one document per topic

Memory is bounded: a record over `max_document_bytes` is quarantined without being held, packed files are unpacked in
small steps. A cut archive loses only its tail. Costs: reading 200-400 MB/s, less for packed files.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson
import zstandard

from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.sources import SourceFile
from raymill.errors import DataError

# One step of input may unpack to 32,000 times its size (zstd), so it is small: at most 64 MiB come out of a step.
_STEP_BYTES = {"plain": 1 << 20, "gz": 1 << 14, "zst": 1 << 11}


@dataclass(frozen=True)
class ReadLimits:
    """How records become documents."""

    text_field: str
    """The field of a jsonl record that holds its text."""
    segment_bytes: int
    """A txt or md file longer than this is cut at its blank lines."""
    max_document_bytes: int
    """Records longer than this are quarantined."""


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every record of a file, in order. Raises DataError when the file changed since it was listed."""
    _check_unchanged(file)
    if file.format == "jsonl":
        yield from _read_jsonl(file, limits)
    elif file.format in ("txt", "md"):
        yield from _read_text(file, limits)
    elif file.format == "py":
        yield _read_whole(file, limits)
    else:
        yield from _read_topics(file)
    _check_unchanged(file)


def _check_unchanged(file: SourceFile) -> None:
    try:
        state = Path(file.path).stat()
        same = (state.st_size, state.st_mtime_ns) == (file.size_bytes, file.mtime_ns)
    except FileNotFoundError:
        same = False
    if not same:
        why = "its size or time of change differs from when the run began"
        raise DataError(f"{file.path} changed while it was read", why=why, fix="let it settle, then run again")


def _read_jsonl(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    for row, (offset, line, fault) in enumerate(_lines(file, limits.max_document_bytes)):
        if fault is not None:
            yield Unreadable(file.name, row, offset, *fault)
        elif line.strip():  # a blank line is no record
            yield _parse_row(file, limits.text_field, row, offset, line)


def _parse_row(file: SourceFile, text_field: str, row: int, offset: int, line: bytes) -> Record:
    def bad(reason: str, detail: str) -> Unreadable:
        return Unreadable(file.name, row, offset, reason, detail)

    try:
        value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        return bad("bad_json", str(error)[:200])
    if not isinstance(value, dict):
        return bad("not_an_object", f"the line holds a {type(value).__name__}")
    if text_field not in value:
        return bad("no_text_field", f"no {text_field!r}; fields: {', '.join(sorted(value))[:200]}")
    text = value[text_field]
    if not isinstance(text, str):
        return bad("text_not_a_string", f"{text_field!r} holds a {type(text).__name__}")
    if "\0" in text:
        return bad("nul", f"a NUL character at {text.index(chr(0))}")
    return Document(f"{file.name}#{row}", text, file.kind, file.source)


def _read_text(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Lines are gathered to a document, which ends at a blank line past `segment_bytes`, or at twice that size."""
    row, start, held = 0, 0, bytearray()
    for offset, line, fault in _lines(file, limits.max_document_bytes):
        held += line
        full = len(held) >= limits.segment_bytes * (2 if line.strip() else 1)
        if held.strip() and (full or fault):
            yield _decode(file, f"{file.name}#{row}", row, start, held)
            row += 1
        if fault is not None:
            yield Unreadable(file.name, row, offset, *fault)
            row += 1
        if full or fault:
            start, held = offset + len(line), bytearray()
    if row == 0:
        yield _decode(file, file.name, None, 0, held)
    elif held.strip():
        yield _decode(file, f"{file.name}#{row}", row, start, held)


def _read_whole(file: SourceFile, limits: ReadLimits) -> Record:
    held = bytearray()
    try:
        for chunk in _chunks(file):
            held += chunk
            if len(held) > limits.max_document_bytes:
                return Unreadable(file.name, None, 0, "too_long", f"over {limits.max_document_bytes:,} bytes")
    except _BrokenFileError as error:
        return Unreadable(file.name, None, len(held), error.reason, error.detail)
    return _decode(file, file.name, None, 0, held)


def _read_topics(file: SourceFile) -> Iterator[Record]:
    """pydoc_data/topics.py is one assignment of one literal: it is parsed, never run."""
    try:
        tree = ast.parse(Path(file.path).read_bytes())
        tables = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    except (SyntaxError, ValueError) as error:
        yield Unreadable(file.name, None, 0, "bad_topics", str(error)[:200])
        return
    for name, text in sorted(tables[0].items()) if tables else ():
        yield Document(f"{file.name}#{name}", text, file.kind, file.source)


def _decode(file: SourceFile, document_id: str, row: int | None, start: int, held: bytearray) -> Record:
    try:
        text = held.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = held.startswith((b"\xff\xfe", b"\xfe\xff"))
        detail = "it is UTF-16; save it as UTF-8" if utf16 else f"byte 0x{held[error.start]:02x}"
        return Unreadable(file.name, row, start + error.start, "not_utf8", detail)
    if "\0" in text:
        return Unreadable(file.name, row, start + held.index(0), "nul", "a NUL byte; is it a binary file?")
    return Document(document_id, text, file.kind, file.source)


Fault = tuple[str, str]


def _lines(file: SourceFile, limit_bytes: int) -> Iterator[tuple[int, bytes, Fault | None]]:
    """(offset, line with its LF, None), or (offset, nothing, reason and detail) for a line that is lost."""
    offset, buffer, skipped = 0, b"", 0
    too_long = "too_long", f"over {limit_bytes:,} bytes"
    try:
        for chunk in _chunks(file):
            *complete, buffer = (buffer + chunk).split(b"\n")
            for line in complete:
                length = skipped + len(line) + 1
                yield (offset, line + b"\n", None) if length <= limit_bytes else (offset, b"", too_long)
                offset, skipped = offset + length, 0
            if len(buffer) > limit_bytes:
                skipped, buffer = skipped + len(buffer), b""
    except _BrokenFileError as error:
        yield offset, b"", (error.reason, error.detail)
        return
    if skipped:
        yield offset, b"", too_long
    elif buffer:
        yield offset, buffer, None


class _BrokenFileError(Exception):
    """The rest of a file cannot be had."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Unpacker(Protocol):
    """What zlib's and zstandard's streaming decompressors share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _unpacker(packing: str) -> _Unpacker:
    return zlib.decompressobj(wbits=31) if packing == "gz" else zstandard.ZstdDecompressor().decompressobj()


def _chunks(file: SourceFile) -> Iterator[bytes]:
    """The unpacked bytes of a file, in steps. An archive may hold several members, one after the other."""
    unpacker: _Unpacker | None = None
    try:
        with Path(file.path).open("rb") as raw:
            while data := raw.read(_STEP_BYTES[file.packing]):
                if file.packing == "plain":
                    yield data
                    continue
                while data:
                    unpacker = unpacker or _unpacker(file.packing)
                    yield unpacker.decompress(data)
                    data = unpacker.unused_data.lstrip(b"\0") if unpacker.eof else b""
                    unpacker = None if unpacker.eof else unpacker
    except (zlib.error, zstandard.ZstdError) as error:
        raise _BrokenFileError("damaged_archive", str(error)[:200]) from None
    except OSError as error:
        raise _BrokenFileError("unreadable", error.strerror or str(error)) from None
    if unpacker is not None or (file.packing != "plain" and file.size_bytes == 0):
        raise _BrokenFileError("damaged_archive", "it ends too early")
