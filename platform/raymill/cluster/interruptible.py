"""Long Ray calls that leave Ctrl-C alone.

Ray Train and Ray Tune put handlers of their own on SIGINT when called from the main thread, and leave them there: Ctrl-C
would end a search with half its trials as if it were done, and would never stop the endpoint afterwards. In another
thread they cannot; the main thread waits, and what interrupts it interrupts the stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_interruptible(call: Callable[[], T], each_second: Callable[[], None]) -> T:
    """What `call` returns or raises; `each_second` is called meanwhile."""
    result: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        each_second()
    if errors:
        raise errors[0]
    return result[0]
