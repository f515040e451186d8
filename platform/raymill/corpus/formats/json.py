"""json: one array of objects, or objects one after the other; each is one document.

The end of each value is found by its brackets and quotes while the file streams by, so memory is one record whatever
the file's size; a value that is no JSON, or longer than a record may be, is lost alone. Costs: 100 MB/s in records of 3 kB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from raymill.corpus.document import Record, Unreadable
from raymill.corpus.formats.jsonl import parse
from raymill.corpus.formats.unpack import BrokenFileError, chunks
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile

_VALUE = re.compile(rb"[^\s,]")
_VALUE_OR_END = re.compile(rb"[^\s,\]]")  # in the one array a closing bracket is its own
_MARKS = re.compile(rb'["{}\[\]\\]')
_IN_STRING = re.compile(rb'["\\]')
_OPEN, _CLOSE, _QUOTE, _ESCAPE = b"{[", b"}]", ord('"'), ord("\\")


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every value of the file, or of the one array that it holds."""
    for offset, data, fault in _values(file, limits.max_document_bytes):
        if fault is not None:
            yield Unreadable(file.name, None, offset, *fault)
        else:
            yield parse(file, limits, offset, data)


def _values(file: SourceFile, limit_bytes: int) -> Iterator[tuple[int, bytes, tuple[str, str] | None]]:
    """(offset, a value's bytes, None), or (offset, nothing, reason and detail)."""
    scan = _Scan(limit_bytes)
    try:
        for chunk in chunks(file):
            yield from scan.feed(chunk)
    except BrokenFileError as error:
        yield scan.begin, b"", (error.reason, error.detail)
        return
    yield from scan.finish()


class _Scan:
    """Where in a value the bytes seen so far end."""

    def __init__(self, limit_bytes: int) -> None:
        self.begin = 0
        """Offset of the value at hand."""
        self._limit_bytes = limit_bytes
        self._offset = 0  # of the next chunk
        self._held = bytearray()
        self._length = 0  # of the value so far, held or not
        self._depth = 0
        self._in_value = self._in_string = self._escaped = False
        self._array = self._seen = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes, tuple[str, str] | None]]:
        at = 3 if self._offset == 0 and chunk.startswith(b"\xef\xbb\xbf") else 0
        while at < len(chunk):
            if not self._in_value:
                at = self._skip(chunk, at)
                if at == len(chunk):
                    break
                self.begin, self._in_value = self._offset + at, True
            end, done = self._find_end(chunk, at)
            self._length += end - at
            if self._length > self._limit_bytes:
                self._held.clear()
            else:
                self._held += chunk[at:end]
            at = end
            if done:
                yield self._take()
        self._offset += len(chunk)

    def finish(self) -> Iterator[tuple[int, bytes, tuple[str, str] | None]]:
        """The value at the end; a cut file ends within one."""
        if self._in_value:
            yield self._take()

    def _take(self) -> tuple[int, bytes, tuple[str, str] | None]:
        fault = ("too_long", f"over {self._limit_bytes:,} bytes") if self._length > self._limit_bytes else None
        taken = bytes(self._held)
        self._held.clear()
        self._length = self._depth = 0
        self._in_value = self._in_string = self._escaped = False
        return self.begin, taken, fault

    def _skip(self, chunk: bytes, at: int) -> int:
        """Where the next value begins, past spaces, commas and the brackets of the one array."""
        while (found := (_VALUE_OR_END if self._array else _VALUE).search(chunk, at)) is not None:
            at = found.start()
            if self._seen or chunk[at] != ord("["):
                self._seen = True
                return at
            self._array = self._seen = True
            at += 1
        return len(chunk)

    def _find_end(self, chunk: bytes, at: int) -> tuple[int, bool]:
        """(end of the value in this chunk, whether it ends there)."""
        if self._escaped:
            self._escaped, at = False, at + 1
        while at < len(chunk):
            if self._in_string:
                found = _IN_STRING.search(chunk, at)
            elif self._depth == 0 and chunk[at] not in _OPEN and chunk[at] != _QUOTE:
                return self._find_scalar_end(chunk, at)
            else:
                found = _MARKS.search(chunk, at)
            if found is None:
                return len(chunk), False
            at, byte = found.end(), chunk[found.start()]
            if byte == _ESCAPE:
                if self._in_string and at == len(chunk):
                    self._escaped = True
                at += self._in_string
            elif byte == _QUOTE:
                self._in_string = not self._in_string
            elif byte in _OPEN:
                self._depth += 1
            else:
                self._depth -= 1
            if self._depth <= 0 and not self._in_string:
                return at, True
        return len(chunk), False

    def _find_scalar_end(self, chunk: bytes, at: int) -> tuple[int, bool]:
        """A bare word or number ends where something else can begin; a stray bracket is a value of its own."""
        found = _SCALAR_END.search(chunk, at)
        if found is None:
            return len(chunk), False
        return max(found.start(), at + (chunk[at] in _CLOSE)), True


_SCALAR_END = re.compile(rb'[\s,{}\[\]"]')
