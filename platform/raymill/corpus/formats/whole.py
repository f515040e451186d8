"""Files that are one document each: source code as it stands, and the main content of a web page.

Memory: one record. Costs: code 400 MB/s, pages what their extractor takes (html.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.formats.text import decode
from raymill.corpus.formats.unpack import BrokenFileError, chunks
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile


def read_code(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """The file as one document."""
    held = read_bytes(file, limits)
    yield held if isinstance(held, Unreadable) else decode(file, file.name, 0, held)


def read_html(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """The page's main content; a page without any is a document without text."""
    held = read_bytes(file, limits)
    yield held if isinstance(held, Unreadable) else page_to_document(file, limits, file.name, 0, bytes(held))


def page_to_document(file: SourceFile, limits: ReadLimits, document_id: str, offset: int, page: bytes) -> Record:
    """One page, from whatever it was kept in."""
    from raymill.corpus import html

    text = html.extract(page, limits.html)
    if "\0" in text:
        return Unreadable(file.name, None, offset, "nul", "a NUL character; is it a binary file?")
    return Document(document_id, text, file.kind, file.source)


def read_bytes(file: SourceFile, limits: ReadLimits) -> bytes | bytearray | Unreadable:
    """All of a file, unless it is longer than a record may be or cannot be had."""
    held = bytearray()
    try:
        for chunk in chunks(file):
            held += chunk
            if len(held) > limits.max_document_bytes:
                return Unreadable(file.name, None, 0, "too_long", f"over {limits.max_document_bytes:,} bytes")
    except BrokenFileError as error:
        return Unreadable(file.name, None, len(held), error.reason, error.detail)
    return held
