"""jsonl: one document per line; a line that is no record is lost alone.

A document's id ends in the byte at which its line begins, so it does not depend on how the file was cut. Costs, in
records of 3 kB: 450 MB/s plain, 190 in .gz, 320 in .zst.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from raymill.corpus.document import Record, Unreadable
from raymill.corpus.formats.columns import to_document
from raymill.corpus.formats.lines import read_lines
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile

_BOM = b"\xef\xbb\xbf"


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every line that begins in the file's range, but for blank ones."""
    for offset, line, fault in read_lines(file, limits.max_document_bytes):
        if fault is not None:
            yield Unreadable(file.name, None, offset, *fault)
        elif not line.isspace():
            yield parse(file, limits, offset, line.removeprefix(_BOM) if offset == 0 else line)


def parse(file: SourceFile, limits: ReadLimits, offset: int, data: bytes) -> Record:
    """The document of one JSON object, which begins at `offset`, or why it is none."""
    try:
        value: Any = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return Unreadable(file.name, None, offset, "bad_json", str(error)[:200])
    if not isinstance(value, dict):
        return Unreadable(file.name, None, offset, "not_an_object", f"a {type(value).__name__}, not an object")
    return to_document(value, file, limits, f"{file.name}#{offset}", None, offset)
