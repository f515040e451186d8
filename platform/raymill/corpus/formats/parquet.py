"""parquet: every row is one document; a range of a file owns the row groups that begin in it.

Only the columns that are asked for are read, in batches of about 4 MiB by the file's own account of its sizes. Memory: a
batch and the pages it spans, 60 MiB for a row group of 100 MB; what remains is a file whose few rows are far longer than
its average, or whose writer made single pages of hundreds of MiB. Costs: 500 MB/s of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raymill.corpus import storage
from raymill.corpus.document import Record, Unreadable
from raymill.corpus.formats.columns import TURNS, to_document
from raymill.corpus.formats.unpack import REFUSALS
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile

_BATCH_BYTES, _BATCH_ROWS = 4 << 20, 4096
_BUFFER_BYTES = 1 << 20
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
T = TypeVar("T")


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every row of the row groups that begin in the file's range. Unreadable rows say their row's number."""
    try:
        opened = storage.open_arrow(file)
    except REFUSALS as error:
        if file.start == 0:  # said once, not by every range
            yield Unreadable(file.name, None, 0, "unreadable", _first_line(error))
        return
    with opened:
        watched = _Watched(opened)
        try:
            source = pq.ParquetFile(pa.PythonFile(watched, "r"), buffer_size=_BUFFER_BYTES, pre_buffer=False)
            yield from _read_groups(file, limits, source, watched)
        except _DAMAGE as error:
            watched.check()
            if file.start == 0:
                yield Unreadable(file.name, None, 0, "damaged_parquet", _first_line(error))


class _Watched:
    """An open file that remembers what its disk or store failed with: pyarrow tells of damage in the same exceptions."""

    def __init__(self, opened: pa.NativeFile) -> None:
        self._opened = opened
        self._fault: OSError | None = None
        self.closed = False

    def check(self) -> None:
        """Raises what reading failed with, if it did."""
        if self._fault is not None:
            raise self._fault

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._watch(lambda: self._opened.read(None if size < 0 else size))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        at: int = self._watch(lambda: self._opened.seek(offset, whence))
        return at

    def tell(self) -> int:
        at: int = self._watch(self._opened.tell)
        return at

    def close(self) -> None:
        self.closed = True  # the reader's; who opened the file closes it

    def _watch(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except OSError as error:
            self._fault = error
            raise


def _read_groups(file: SourceFile, limits: ReadLimits, source: pq.ParquetFile, watched: _Watched) -> Iterator[Record]:
    columns = _choose_columns(file, source.schema_arrow.names)
    if not columns:
        if file.start == 0:
            detail = f"no {file.settings.text_field!r}; columns: {', '.join(source.schema_arrow.names)[:200]}"
            yield Unreadable(file.name, None, 0, "no_text_field", detail)
        return
    stop = file.size_bytes if file.stop is None else file.stop
    first_row = 0
    for number in range(source.num_row_groups):
        group = source.metadata.row_group(number)
        begin = _begin(group, file.size_bytes)
        if file.start <= begin < stop:
            yield from _read_group(file, limits, source, watched, number, columns, first_row, begin)
        first_row += group.num_rows


def _read_group(
    file: SourceFile,
    limits: ReadLimits,
    source: pq.ParquetFile,
    watched: _Watched,
    number: int,
    columns: list[str],
    first_row: int,
    begin: int,
) -> Iterator[Record]:
    """A group that breaks in its middle gives the rows before, and one fault for the rest."""
    group = source.metadata.row_group(number)
    row = first_row
    try:
        for batch in source.iter_batches(_batch_rows(group), [number], columns, use_threads=False):
            for record in _records(batch):
                if isinstance(record, dict):
                    yield to_document(record, file, limits, f"{file.name}#{row}", row, begin)
                else:
                    yield Unreadable(file.name, row, begin, "not_utf8", record)
                row += 1
    except _DAMAGE as error:
        watched.check()
        yield Unreadable(file.name, row, begin, "damaged_parquet", _first_line(error))


def _choose_columns(file: SourceFile, names: list[str]) -> list[str]:
    """The columns a document is made of, in the file's order; none when it lacks what a text needs."""
    settings = file.settings
    if settings.template is not None:
        wanted = set(settings.template.columns)
    else:
        wanted = {*TURNS, settings.text_field}  # each row is read from the first of these that it holds
    if not wanted & set(names):
        return []
    return [name for name in names if name in wanted | set(settings.keep)]


def _begin(group: Any, size_bytes: int) -> int:
    """Where a row group begins, whatever the file says within its size: every group has exactly one range."""
    column = group.column(0)
    offsets = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        offsets.append(column.dictionary_page_offset)
    return max(0, int(min(*offsets, size_bytes - 1)))


def _batch_rows(group: Any) -> int:
    row_bytes = group.total_byte_size // max(group.num_rows, 1) + 1
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES // max(row_bytes, 1))))


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows as Python values; for a row that has text which is no UTF-8, what is wrong with it."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        records: list[dict[str, Any] | str] = []
        for index in range(batch.num_rows):
            try:
                records.append(batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                records.append(f"byte 0x{error.object[error.start]:02x}")
        return records


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
