"""A completion's ids to the text that may be shown, ending at the first stop string.

Text that could be the beginning of a stop string is held back until the next ids decide, so a client never sees a part
of one. A character whose bytes are spread over several ids comes out whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Ids to text, one at a time; `tokenizer.tokenizer.StreamDecoder` is one."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class TextStream:
    """The text of one completion as its ids come."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string would stop everything"
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text this id releases. After a stop string `stopped` is true and nothing more comes."""
        if not self._stop:
            return self._decoder.push(token)
        if self.stopped:
            return ""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
