"""Bytes to be taken from the front of a stream, searched in, left out and given back: what records of known length need.

Memory: what is taken, and one step of the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_MARK_BYTES = 64
"""No pattern that is searched for is longer."""


class ByteStream:
    """Chunks as one run of bytes; `offset` is where the next one lies."""

    def __init__(
        self,
        source: Iterator[bytes],
        offset: int,
        end: int | None = None,
        reopen: Callable[[int], Iterator[bytes]] | None = None,
    ) -> None:
        """`end` is where it ends, if that is known; `reopen` gives its chunks from an offset on, if they can be had again."""
        self.offset = offset
        self.end = end
        self._source = source
        self._reopen = reopen
        self._held, self._at = b"", 0
        self._budget_bytes = 1 << 30  # what may be read again: an archive of nothing but lies would never end

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._held) - self._at < size and self._fill():
            pass
        return self._held[self._at : self._at + size]

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        parts, missing = [], size
        while missing > 0 and (self._at < len(self._held) or self._fill()):
            part = self._held[self._at : self._at + missing]
            parts.append(part)
            self._move(len(part))
            missing -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Leaves bytes out; how many there were."""
        left = size
        while left > 0 and (self._at < len(self._held) or self._fill()):
            step = min(left, len(self._held) - self._at)
            self._move(step)
            left -= step
        return size - left

    def back(self, offset: int, taken: bytes | None) -> None:
        """To an earlier place, if what was taken since is given back or can be read again; else it stays where it is."""
        size = self.offset - offset
        if size > self._budget_bytes or (taken is None and self._reopen is None):
            return
        self._budget_bytes -= size
        if taken is not None:
            self._held, self._at = taken + self._held[self._at :], 0
        elif self._reopen is not None:
            self._source, self._held, self._at = self._reopen(offset), b"", 0
        self.offset = offset

    def find(self, pattern: re.Pattern[bytes], stop: int | None = None) -> bool:
        """To where a pattern next matches, if that is before `stop`."""
        while True:
            match = pattern.search(self._held, self._at)
            if match is not None:
                self._move(match.start() - self._at)
                return stop is None or self.offset < stop
            self._move(max(len(self._held) - self._at - _MARK_BYTES, 0))
            if (stop is not None and self.offset >= stop) or not self._fill():
                self._move(len(self._held) - self._at)
                return False

    def _move(self, size: int) -> None:
        self._at += size
        self.offset += size

    def _fill(self) -> bool:
        more = next(self._source, None)
        if more is None:
            return False
        # Some bytes before the next one stay, for patterns that look behind.
        keep = max(self._at - _MARK_BYTES, 0)
        self._held, self._at = self._held[keep:] + more, self._at - keep
        return True
