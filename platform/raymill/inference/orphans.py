"""Processes that others start in our name end with us, however we end: also by kill -9, where nothing of ours runs any more.

A guard of a few MB waits for the end of a pipe that only we hold open, and then kills them. Linux only, as its processes'
handles are: a number alone may have become another process's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

_GUARD = """
import os, signal, sys
guarded = [os.pidfd_open(int(pid)) for pid in sys.argv[1:]]
sys.stdin.buffer.read()
for each in guarded:
    try:
        signal.pidfd_send_signal(each, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class Guard:
    """Kills `pids` when this process ends without `close`."""

    def __init__(self, pids: Collection[int]) -> None:
        command = [sys.executable, "-I", "-S", "-c", _GUARD, *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Lets them be."""
        self._process.kill()
        self._process.communicate()
