"""Moment: something that happens once, and that threads wait for.

Why not threading.Event: it is Python on a lock. A signal's handler runs between two instructions of
the main thread, and may raise there (KeyboardInterrupt); if that is right after Event has taken its
lock, the lock is never released, and who sets the event hangs. Here every step is one call into C,
which is done or not done, and what an interrupt leaves behind between two of them harms nobody.
"""

from __future__ import annotations

import collections
import contextlib
import threading


class Moment:
    """Any thread may call any method, and be interrupted in it."""

    __slots__ = ("_come", "_waiters")

    def __init__(self) -> None:
        self._come = False
        self._waiters: collections.deque[threading.Lock] = collections.deque()

    def set(self) -> None:
        """Let it have come. Again: no matter."""
        self._come = True
        while self._waiters:
            with contextlib.suppress(IndexError):  # another thread sets it as well
                self._waiters.popleft().release()

    def is_set(self) -> bool:
        """Whether it has come."""
        return self._come

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, at most ``timeout`` seconds; return whether it has come."""
        if self._come:
            return True
        mine = threading.Lock()
        mine.acquire()
        self._waiters.append(mine)
        if not self._come:  # after the append: it comes before, and is seen, or finds the lock
            seconds = -1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
            mine.acquire(timeout=seconds)
        with contextlib.suppress(ValueError):  # it has come, and has taken the lock out
            self._waiters.remove(mine)
        return self._come
