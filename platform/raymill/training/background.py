"""Work beside training: one thread runs saves and validations in the order in which they were given.

The order is a promise: a checkpoint of step S that is there implies that every validation up to S was written. So after
a job has failed none of the later ones runs, and its error is raised in the loop's thread at the next chance.

A job must let go of Python's lock while it computes, copies, hashes or writes, or the loop waits for it. The thread is a
daemon: a process that ends does not wait for it, and what it was writing is not yet published.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

Job = Callable[[], object]


class Background:
    """Use as a context: it is left when every job is done, and raises what one raised."""

    def __init__(self, while_waiting: Job = lambda: None) -> None:
        """`while_waiting` is called every second that the loop waits for work here."""
        self._while_waiting = while_waiting
        self._closed = False
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Job, Job | None]] = deque()
        self._busy = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, kind: str, job: Job, after: Job | None = None) -> None:
        """Lets the job run after all before it. Blocks while another of its kind has not begun; raises what one raised.

        `after` gives back what the job used: it is called when the job is over, has failed or will never run.
        """
        with self._changed:
            self._wait_for(lambda: bool(self._error) or all(kind != each[0] for each in self._waiting))
            if self._error is not None and after is not None:
                after()
            self._raise()
            self._waiting.append((kind, job, after))
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="background", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Returns when every job is done; raises what one raised."""
        with self._changed:
            self._wait_for(lambda: not self._busy and not self._waiting)
            self._raise()

    def acquire(self, lock: threading.Lock) -> None:
        """Takes a lock that work here gives back."""
        while not lock.acquire(timeout=1.0):
            self._while_waiting()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as later:
            if error is None:
                raise
            if later is not error:
                error.add_note(f"beside it, work in the background failed: {later}")
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _wait_for(self, done: Callable[[], bool]) -> None:
        while not self._changed.wait_for(done, timeout=1.0):
            self._while_waiting()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                _, job, after = self._waiting.popleft()
                self._busy = True
                self._changed.notify_all()
            given_up: list[Job | None] = [after]
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    given_up += [each[2] for each in self._waiting]
                    self._waiting.clear()
            for give_back in given_up:
                if give_back is not None:
                    give_back()
            del job, after, given_up  # and what they hold
            with self._changed:
                self._busy = False
                self._changed.notify_all()
