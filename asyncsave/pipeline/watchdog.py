"""Watchdog: says what a save waits for when it has stood still for too long.

A disk or a network mount that hangs raises no error: write(2) or fsync(2) just does not return. All
that can be done then is to say so, while the training goes on. The save itself tells how far it is;
a timer on the event loop compares.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import time
from pathlib import Path

from ..errors import ConfigError

_log = logging.getLogger("asyncsave")

STALL_WARNING_SECONDS = 60.0
"""Default. A disk that is merely slow writes its 16 MiB in far less time."""


def parse_stall_warning(seconds: float | None) -> float | None:
    """Return ``seconds`` if it can be a time to wait."""
    if seconds is None or (type(seconds) in (int, float) and 0 < seconds < math.inf):
        return seconds
    raise ConfigError(
        f"stall_warning_seconds={seconds!r} must be a positive number, or None for no warning"
    )


class Watchdog:
    """Watches one save. Belongs to the event loop's thread.

    A warning is logged once the save has stood still for ``seconds``, and again each time that has
    doubled.

    Args:
        path: the checkpoint that is being saved.
        seconds: None: it only listens.
    """

    def __init__(self, path: Path, seconds: float | None) -> None:
        self._path = path
        self._seconds = seconds
        self._due = seconds or 0.0
        self._feeding = ""
        self._writing = ""
        self._moved = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch from now on; call it in the event loop."""
        self._moved = time.monotonic()
        self._watch(self._due)

    def feeding(self, doing: str) -> None:
        """Note what the save's front is about to wait for: copies, memory."""
        self._feeding = doing
        self._advance()

    def writing(self, doing: str) -> None:
        """Note what its end is about to wait for: a write, a sync; "": for what the front feeds."""
        self._writing = doing
        self._advance()

    def close(self) -> None:
        """Watch no longer."""
        self._seconds = None
        if self._timer is not None:
            self._timer.cancel()

    def _advance(self) -> None:
        self._moved = time.monotonic()
        if self._seconds is not None and self._due != self._seconds:  # it had stood still
            self._due = self._seconds
            self._watch(self._due)

    def _watch(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        stood = time.monotonic() - self._moved
        if stood >= self._due:
            since = datetime.datetime.now().astimezone() - datetime.timedelta(seconds=stood)
            _log.warning(
                "the save of %s has stood still for %.1f s, since %s, %s",
                self._path,
                stood,
                since.isoformat(" ", "seconds"),
                self._writing or self._feeding,
            )
            self._due *= 2
        self._watch(self._due - stood)
