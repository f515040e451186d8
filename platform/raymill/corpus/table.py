"""The columns of a corpus file, and documents on their way into one.

id, source, kind       text; kind is prose, code, chat or task
language               ISO code, where the job asked for languages
text                   all of the document
parts                  list of (role, end_byte, learn), null for plain text: the pieces of `text`, one after the other
start_char, end_char   where a segment lies in its document; only if the job cuts segments
...                    fields that the job asked to keep, as text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raymill.corpus.document import Part

_PART = pa.struct([("role", pa.string()), ("end_byte", pa.int64()), ("learn", pa.bool_())])
_FIXED = [
    ("id", pa.string()),
    ("source", pa.string()),
    ("kind", pa.string()),
    ("language", pa.string()),
    ("text", pa.large_string()),
    ("parts", pa.list_(_PART)),
]
_PLACE = [("start_char", pa.int64()), ("end_char", pa.int64())]
COLUMNS = tuple(name for name, _ in (*_FIXED, *_PLACE))
"""What the columns are called that a corpus has of its own: no kept field may be called so."""
_REPEATING = ["source", "kind", "language"]


def schema_of(*, segments: bool, kept: Sequence[str]) -> pa.Schema:
    """The columns of a corpus whose documents are segments or not, with these fields kept."""
    return pa.schema([*_FIXED, *(_PLACE if segments else []), *((name, pa.string()) for name in kept)])


def open_writer(file: IO[bytes], schema: pa.Schema, compression: str) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression=compression, use_dictionary=_REPEATING, write_statistics=False)


def describe_parts(parts: Sequence[Part]) -> list[dict[str, Any]] | None:
    """The value of the column `parts`."""
    described, end = [], 0
    for part in parts:
        end += len(part.text.encode())
        described.append({"role": part.role, "end_byte": end, "learn": part.learn})
    return described or None


class Rows:
    """Documents held for the next row group."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns: list[list[Any]] = [[] for _ in schema]
        self.text_bytes = 0

    def add(self, values: dict[str, Any], text_bytes: int) -> None:
        """One document by column name; a column it lacks is null."""
        for name, column in zip(self._schema.names, self._columns, strict=True):
            column.append(values.get(name))
        self.text_bytes += text_bytes

    def take(self) -> pa.Table:
        """All that is held, which is held no longer."""
        arrays = [pa.array(column, each.type) for column, each in zip(self._columns, self._schema, strict=True)]
        self._columns = [[] for _ in self._schema]
        self.text_bytes = 0
        return pa.Table.from_arrays(arrays, schema=self._schema)


def text_size(table: pa.Table) -> int:
    """UTF-8 bytes in the column `text`."""
    return int(pc.sum(pc.binary_length(table["text"])).as_py() or 0)
