"""The step in C++: sources, compiled once on each node, and the one way to get at them.

`library()` gives the compiled sources as a ctypes library, or None where there is no compiler: the torch step serves then.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading

from raymill.errors import MachineError
from raymill.inference.native.build import Target, best_target, built_library

__all__ = ["library"]

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
"""Threads that ask at once compile once, and are told once."""


def library(target: Target | None = None) -> ctypes.CDLL | None:
    """The sources of this folder, compiled for `target`, by default the best that this CPU runs; None without a compiler.

    The first call on a node compiles (6 s on two cores); later ones load what lies in the cache (10 ms). A call through the
    library releases Python's lock.
    """
    with _one_at_a_time:
        return _library(target or best_target())


@functools.cache
def _library(target: Target) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(built_library(target)))
    except (MachineError, OSError) as error:
        _log.warning("the native step cannot be used; the slower torch step serves instead\n%s", error)
        return None
