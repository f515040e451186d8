"""A file to its documents, one at a time; what cannot be read comes out as a quarantine record, never as a crash.

    code, html                  one document per file
    txt, md                     one document per file; a long one is cut at blank lines
    jsonl, json, csv, parquet   one document per record: its text, its conversation, or the task a template makes of it
    warc                        one document per archived page
    topics                      pydoc's table of Python's language documentation, one document per topic

A file may be given as a range of its bytes: the records that begin in it are read, whichever way the file was cut.
Memory is bounded: a record over `max_document_bytes` is quarantined without being held, packed files are unpacked in
small steps. A cut archive loses only its tail. Costs: reading 200-400 MB/s, less for packed files and pages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

from raymill.corpus import storage
from raymill.corpus.document import Record
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import Format, SourceFile
from raymill.errors import DataError

__all__ = ["ReadLimits", "read"]

Reader = Callable[[SourceFile, ReadLimits], Iterator[Record]]

_READERS: dict[Format, tuple[str, str]] = {
    "txt": ("text", "read"),
    "md": ("text", "read"),
    "code": ("whole", "read_code"),
    "html": ("whole", "read_html"),
    "jsonl": ("jsonl", "read"),
    "json": ("json", "read"),
    "csv": ("csv", "read"),
    "tsv": ("csv", "read"),
    "parquet": ("parquet", "read"),
    "warc": ("warc", "read"),
    "topics": ("topics", "read"),
}
"""Module below corpus/formats and its function: a format is loaded when a file of it is met."""


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every record that begins in the file's range, in order. Raises DataError when the file changed since it was listed."""
    module, function = _READERS[file.format]
    reader: Reader = getattr(importlib.import_module(f"raymill.corpus.formats.{module}"), function)
    _check_unchanged(file)
    yield from reader(file, limits)
    _check_unchanged(file)


def _check_unchanged(file: SourceFile) -> None:
    if storage.state(file) != (file.size_bytes, file.mtime_ns):
        why = "its size or time of change differs from when the run began"
        raise DataError(f"{file.shown} changed while it was read", why=why, fix="let it settle, then run again")
