"""The bytes of a file in steps, unpacked: plain, gzip (any number of members) or zstd (any number of frames).

Memory: one step. A cut or damaged archive gives all that comes before the fault, then `BrokenFileError`; so does a file
that may not be read. Any other OSError (a disk or store that fails now) is left to be seen: the work can be done again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import zstandard

from raymill.corpus import storage
from raymill.corpus.sources import SourceFile

REFUSALS = (PermissionError, IsADirectoryError)
"""What a file answers now and will answer the next time; any other OSError may be gone by then."""
# One step of input may unpack to 32,000 times its size (zstd), so it is small: at most 64 MiB come out of a step.
_STEP_BYTES = {"plain": 1 << 20, "gz": 1 << 14, "zst": 1 << 11}


class BrokenFileError(Exception):
    """The rest of a file cannot be had: a reason of one word, and what exactly was found."""

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


def chunks(file: SourceFile, start: int = 0) -> Iterator[bytes]:
    """The unpacked bytes of a file, of a plain one from `start` on. Raises BrokenFileError, and OSError when it fails now."""
    unpacker: _Unpacker | None = None
    try:
        raw = storage.open_file(file)
        try:
            if start:
                raw.seek(start)
            while data := raw.read(_STEP_BYTES[file.packing]):
                if file.packing == "plain":
                    yield data
                    continue
                while data:
                    unpacker = unpacker or _unpacker(file.packing)
                    yield unpacker.decompress(data)
                    data = unpacker.unused_data.lstrip(b"\0") if unpacker.eof else b""
                    unpacker = None if unpacker.eof else unpacker
        finally:
            raw.close()
    except (zlib.error, zstandard.ZstdError) as error:
        raise BrokenFileError("damaged_archive", str(error)[:200]) from None
    except REFUSALS as error:
        raise BrokenFileError("unreadable", error.strerror or str(error)[:200]) from None
    if unpacker is not None or (file.packing != "plain" and file.size_bytes == 0):
        raise BrokenFileError("damaged_archive", "it ends too early")


def _unpacker(packing: str) -> _Unpacker:
    return zlib.decompressobj(wbits=31) if packing == "gz" else zstandard.ZstdDecompressor().decompressobj()
