"""csv and tsv: the first row names the columns, every further row is one document.

Rows are read as RFC 4180 has them, a quoted field may hold line ends. A quote that is never closed would swallow the rest
of the file: where a row grows past the limit its first line is quarantined, and reading goes on with the second. A file
is streamed by one task, since nothing in its middle tells whether a line end is quoted. Memory: one row. Costs: 170 MB/s.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator

from raymill.corpus.document import Record, Unreadable
from raymill.corpus.formats.columns import to_document
from raymill.corpus.formats.lines import Line, read_lines
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile

_MAX_RETRIES = 8
_NO_FIELD_LIMIT = 2**31 - 1  # the module's own is 128 KiB; rows are bounded here


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every row behind the header, in order."""
    csv.field_size_limit(_NO_FIELD_LIMIT)
    header: list[str] | None = None
    for offset, row, fault in _rows(file, limits.max_document_bytes):
        if fault is not None:
            yield Unreadable(file.name, None, offset, *fault)
            if header is None:
                detail = "the first row is no list of column names, so the rest cannot be read"
                yield Unreadable(file.name, None, offset, "bad_header", detail)
                return
        elif header is None:
            header = row
        elif len(row) != len(header):
            detail = f"{len(row)} fields under {len(header)} columns"
            yield Unreadable(file.name, None, offset, "ragged_row", detail)
        else:
            record = dict(zip(header, row, strict=True))
            yield to_document(record, file, limits, f"{file.name}#{offset}", None, offset)


def _rows(file: SourceFile, limit_bytes: int) -> Iterator[tuple[int, list[str], tuple[str, str] | None]]:
    """(offset, fields, None) of a row, or (offset, nothing, reason and detail)."""
    source = _Rows(read_lines(file, limit_bytes), limit_bytes)
    delimiter = "\t" if file.format == "tsv" else ","
    parser = csv.reader(source, delimiter=delimiter)
    while True:
        try:
            row = next(parser)
            fault = source.fault
        except StopIteration:
            return
        except _OpenQuoteError:
            row, fault = [], ("open_quote", f"a quote that is not closed within {limit_bytes:,} bytes")
            offset = source.give_back()
            parser = csv.reader(source, delimiter=delimiter)
            yield offset, row, fault
            continue
        except csv.Error as error:
            row, fault = [], ("bad_csv", str(error)[:200])
        if row and fault is None:
            fault = _check(row)
        if row or fault is not None:  # a blank line is no record
            yield source.offset, row, fault
        source.begin_row()


def _check(row: list[str]) -> tuple[str, str] | None:
    for field in row:
        if not field.isascii():
            try:
                field.encode()
            except UnicodeEncodeError as error:
                return "not_utf8", f"byte 0x{ord(field[error.start]) & 0xFF:02x}"
        if "\0" in field:
            return "nul", f"a NUL character at {field.index(chr(0))}"
    return None


class _OpenQuoteError(Exception):
    """A row goes on past the limit, or to the end of the file."""


class _Rows:
    """The lines a csv parser asks for, and which of them make the row at hand."""

    def __init__(self, lines: Iterator[Line], limit_bytes: int) -> None:
        self._lines = lines
        self._limit_bytes = limit_bytes
        self._held: list[Line] = []
        self._held_bytes = 0
        self._back: deque[Line] = deque()
        self._retries, self._last_failure = 0, -1  # in a row, and how far the last one had read
        self.fault: tuple[str, str] | None = None

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> str:
        """The next line of the row; bytes that are no UTF-8 become lone surrogates, to be found in the row."""
        line = self._back.popleft() if self._back else next(self._lines, None)
        if line is None:
            if self._held:
                raise _OpenQuoteError
            raise StopIteration
        offset, data, fault = line
        self._held.append(line)
        self._held_bytes += len(data)
        if len(self._held) > 1 and (fault is not None or self._held_bytes > self._limit_bytes):
            raise _OpenQuoteError
        self.fault = fault
        return (data.removeprefix(b"\xef\xbb\xbf") if offset == 0 else data).decode("utf-8", "surrogateescape")

    @property
    def offset(self) -> int:
        """Where the row at hand begins."""
        return self._held[0][0]

    def begin_row(self) -> None:
        """What was asked for from here on is another row."""
        self._held, self._held_bytes, self.fault = [], 0, None

    def give_back(self) -> int:
        """Forgets the first line of the row, whose offset it says; the others are read again.

        Where one line after the other opens a quote, all of them are forgotten: time stays linear in the file's size.
        """
        offset = self.offset
        self._retries = self._retries + 1 if offset <= self._last_failure else 1
        self._last_failure = self._held[-1][0]
        if self._retries <= _MAX_RETRIES:
            self._back.extendleft(reversed(self._held[1:]))
        self.begin_row()
        return offset
