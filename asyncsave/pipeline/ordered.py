"""Ordered: tasks that run side by side, and come out in the order in which they went in."""

from __future__ import annotations

import asyncio
import collections
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")


class Ordered(Generic[_T]):
    """At most ``size`` units of work on their way. Belongs to the event loop's thread.

    Whoever feeds it calls `reserve` for each unit, `put` for each task of one or more units, and
    `end`. Whoever takes tasks out iterates, and gives the units back by `finished`.

    ::

        feeder  ─ reserve ─ put ──▶ tasks, at work ──▶ async for ─ finished ─  taker
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._reserved = 0
        self._room = asyncio.Event()
        self._tasks: collections.deque[asyncio.Future[_T]] = collections.deque()
        self._ended = False
        self._more = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether `reserve` would wait."""
        return self._reserved >= self._size

    async def reserve(self) -> None:
        """Wait until there is room for one more unit, and take it."""
        while self.is_full:
            self._room.clear()
            await self._room.wait()
        self._reserved += 1

    def put(self, task: asyncio.Future[_T]) -> None:
        """Add a task, whose units were reserved."""
        self._tasks.append(task)
        self._more.set()

    def end(self) -> None:
        """Let the iteration end once it has come to the last task."""
        self._ended = True
        self._more.set()

    def finished(self, units: int) -> None:
        """Give back what tasks that were taken out had reserved."""
        self._reserved -= units
        self._room.set()

    def widen(self, size: int) -> None:
        """Let there be room for ``size`` units, if that is more than there was."""
        self._size = max(self._size, size)
        self._room.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        while not self._tasks:
            if self._ended:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return await self._tasks.popleft()

    async def drain(self) -> None:
        """Wait for all tasks, and drop what comes of them. Nothing may be put meanwhile."""
        while self._tasks:
            task = self._tasks.popleft()
            await asyncio.wait([task])
            task.exception()  # of a save that fails for another reason, or for this one again
