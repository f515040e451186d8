"""Texts as one run of UTF-8 bytes and where each begins: what the compiled loops read. Arrow's bytes are not copied.

Arrow is imported where it is used: a serving replica encodes one text at a time and does without its 26 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def arrow(texts: Sequence[str] | pa.Array) -> pa.Array:
    """Texts as an Arrow array with 64-bit offsets; half a surrogate pair becomes U+FFFD."""
    import pyarrow as pa

    if isinstance(texts, pa.Array):
        assert texts.null_count == 0
        return texts.cast(pa.large_string())
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([encodable(text) for text in texts], pa.large_string())


def bytes_and_offsets(array: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Text i is the bytes from offset i to offset i + 1."""
    import pyarrow as pa

    if not len(array):
        return _view(None, np.uint8), _view(pa.py_buffer(bytes(8)), np.int64)
    _, offsets, text = array.buffers()
    return _view(text, np.uint8), _view(offsets, np.int64)[array.offset : array.offset + len(array) + 1]


def encodable(text: str) -> str:
    """JSON can carry half a surrogate pair, which is no text: it becomes U+FFFD, a whole pair its character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _view(buffer: pa.Buffer | None, dtype: type[np.generic]) -> NDArray[Any]:
    """An Arrow buffer as an array that is not to be written to: the loops are compiled for that kind only."""
    array: NDArray[Any] = np.frombuffer(buffer or b"", dtype)
    array.flags.writeable = False
    return array
