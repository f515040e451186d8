"""The members of a .gz that are records of their own, as archives of the web have them: found, unpacked, resumed.

A range owns the members that begin in it. Where a member is damaged the next one is found by its header and by what it
unpacks to. Memory: one step (up to 16 MiB where a member unpacks to a thousand times its size).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from raymill.corpus import storage
from raymill.corpus.formats.unpack import BrokenFileError
from raymill.corpus.sources import SourceFile

_MAGIC = b"\x1f\x8b\x08"
_STEP_BYTES, _SCAN_BYTES, _PROBE_BYTES = 16 << 10, 1 << 20, 4 << 10


class Members:
    """Walks the members of a file's range; each is to be read to its end before the next is asked for."""

    def __init__(self, file: SourceFile, begins_with: bytes) -> None:
        self._file = file
        self._begins_with = begins_with
        self._raw = storage.open_file(file)
        self._next = file.start
        self._stop = file.size_bytes if file.stop is None else file.stop

    def close(self) -> None:
        self._raw.close()

    def __iter__(self) -> Iterator[int]:
        """Where each member begins."""
        if self._next > 0:
            self._find(self._next)
        while self._next < self._stop:
            begin = self._next
            self._next = begin + 1  # if it is not read to its end
            yield begin

    def read(self, begin: int) -> Iterator[bytes]:
        """The member's bytes. After a fault the next member is searched for. Raises BrokenFileError."""
        unpacker = zlib.decompressobj(wbits=31)
        at = begin
        self._raw.seek(begin)
        try:
            while not unpacker.eof:
                data = self._raw.read(_STEP_BYTES)
                if not data:
                    raise BrokenFileError("damaged_archive", "it ends too early")
                at += len(data)
                yield unpacker.decompress(data)
                self._raw.seek(at)
        except (zlib.error, BrokenFileError) as error:
            self._find(begin + 1)
            raise BrokenFileError("damaged_archive", str(error)[:200]) from None
        self._next = at - len(unpacker.unused_data)
        self._raw.seek(self._next)
        if self._raw.read(1) == b"\0":  # padding
            self._find(self._next)

    def _find(self, begin: int) -> None:
        """The next member from `begin` on whose first bytes are those of a record."""
        at, before = begin, b""
        while at < self._stop:
            self._raw.seek(at)
            block = before + self._raw.read(_SCAN_BYTES)
            if len(block) == len(before):
                break
            first = at - len(before)
            found = block.find(_MAGIC)
            while found >= 0 and first + found < self._stop:
                if self._is_member(first + found):
                    self._next = first + found
                    return
                found = block.find(_MAGIC, found + 1)
            at = first + len(block)
            before = block[1 - len(_MAGIC) :]
        self._next = self._stop

    def _is_member(self, begin: int) -> bool:
        self._raw.seek(begin)
        try:
            head = zlib.decompressobj(wbits=31).decompress(self._raw.read(_PROBE_BYTES), len(self._begins_with))
        except zlib.error:
            return False
        return head == self._begins_with
