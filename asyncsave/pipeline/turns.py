"""Turns: one thread after the other uses a Saver or a Checkpointer, and none waits for itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ..errors import BusyError, ClosedError


class Turns:
    """Gives turns, in the process that made it, until it is ``closed``.

    Args:
        in_callback: whether the caller is what a turn would wait for.
        what: what it is a turn of, for errors.
    """

    def __init__(self, in_callback: Callable[[], bool], what: str) -> None:
        self.closed = False
        self._what = what
        self._in_callback = in_callback
        self._pid = os.getpid()
        self._lock = threading.RLock()

    @property
    def is_parents(self) -> bool:
        """Whether this is a forked child's copy, which has no threads."""
        return self._pid != os.getpid()

    def take(self) -> threading.RLock:
        """Return what gives a turn: ``with turns.take(): turns.check()``.

        It is a lock, which is taken and given back in one step. A context manager in Python could
        be interrupted between its taking a lock and the statement's beginning.

        Raises:
            ClosedError: it belongs to another process.
            BusyError: the caller has a turn already, or is waited for by whoever has it.
        """
        if self.is_parents:  # before the lock, which a thread of the parent may have held
            raise ClosedError(f"this {self._what} belongs to the parent process; make one here")
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise BusyError(
                f"this {self._what} is at work in this thread already, and was interrupted (by a "
                "signal's handler?) or calls back; set a flag there, which the training looks at"
            )
        if self._in_callback():
            raise BusyError(
                f"a done callback cannot use its {self._what}, whose saves wait for the callback "
                "to return; hand over to a thread of your own"
            )
        return self._lock

    def check(self) -> None:
        """Raise ClosedError if it was closed before the turn came."""
        if self.closed:
            raise ClosedError(f"this {self._what} is closed; make a new one")
