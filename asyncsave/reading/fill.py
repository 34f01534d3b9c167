"""Fill: an extent of a checkpoint's addresses, and the memory that its bytes are to be in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np

from ..pages import Bytes

_NOTHING: Bytes = np.empty(0, np.uint8)


class Fill:
    """An extent of one rank's address space, and the memory it is to fill.

    Args:
        start: its first address, in bytes.
        nbytes: its length.
        memory: a uint8 array of that length; or a function that makes one, called when it is
            needed.
        finish: called once the memory is full, in the thread that filled it.
        rank: whose address space it is in.
    """

    __slots__ = ("_finish", "_lock", "_memory", "_missing", "rank", "start", "stop")

    def __init__(
        self,
        start: int,
        nbytes: int,
        memory: Bytes | Callable[[], Bytes],
        finish: Callable[[], None] | None = None,
        rank: int = 0,
    ) -> None:
        self.rank = rank
        self.start = start
        self.stop = start + nbytes
        self._memory = memory
        self._finish = finish
        self._missing = nbytes
        self._lock = threading.Lock()

    def part(self, start: int, stop: int) -> Bytes:
        """Return the memory for the addresses ``start`` to ``stop``."""
        with self._lock:
            if callable(self._memory):
                self._memory = self._memory()
            return self._memory[start - self.start : stop - self.start]

    def filled(self, nbytes: int) -> None:
        """Note that so many bytes more are there."""
        with self._lock:
            self._missing -= nbytes
            complete = self._missing == 0
        if complete:
            if self._finish is not None:
                self._finish()
            self._memory = _NOTHING  # what was only on the way is not needed any more


def tiles(fills: Iterable[Fill], start: int, stop: int) -> list[Bytes]:
    """Return the memory of fills, in address order, for ``start`` to ``stop``; [] if it has gaps.

    Or if fills overlap there.
    """
    pieces: list[Bytes] = []
    at = start
    for fill in fills:
        if fill.start > at or (fill.start < at and pieces):
            return []
        last = min(stop, fill.stop)
        pieces.append(fill.part(at, last))
        at = last
    return pieces if at == stop else []


def scatter(raw: Bytes, start: int, fills: Iterable[Fill]) -> None:
    """Copy to each fill what it needs of the bytes ``raw``, whose first address is ``start``."""
    stop = start + raw.size
    for fill in fills:
        first, last = max(start, fill.start), min(stop, fill.stop)
        np.copyto(fill.part(first, last), raw[first - start : last - start])
        fill.filled(last - first)
