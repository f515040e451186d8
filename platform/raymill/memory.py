"""Memory of the process that nothing uses any more."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back_memory() -> None:
    """Returns to the system what was freed: glibc keeps it, between what is in use, for a next time that may not come."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)
