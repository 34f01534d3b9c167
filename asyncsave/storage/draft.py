"""Draft: from a directory being written to a checkpoint.

The order is the promise, each step only after the one before has returned:

    begin     a hidden directory, locked; its data file
    append    frames, one after the other, each on pages of its own
    end_data  data synced
    seal      sidecars synced → rank manifest synced
    publish   checkpoint.json synced → directory synced → rename → parent synced

and only then it is reported durable, and older checkpoints may be pruned.

A directory that is being written has a hidden name with a random token, ``.step-000001000.1f3a…``,
and its writer holds a lock on it, so that its leftovers can be told from a save that is still
running.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Self, TypeVar

from ..errors import (
    BusyError,
    CheckpointExistsError,
    CommitError,
    LoadError,
    WriteError,
    looking,
)
from ..format.files import CHECKPOINT_FILE, MAX_BYTES, data_file, linked_file, rank_file
from ..format.records import FileRecord
from .disk import Lock
from .files import NewFile
from .place import Identity, Place

_log = logging.getLogger("asyncsave")
_T = TypeVar("_T")

REPLACED = ".replaced"
"""Ends the hidden name of a checkpoint whose place another is about to take; see `_rename`."""

_TRIES = 5
"""How many names are tried: before it is locked, a sweep may take one for a dead writer's."""


def hidden(target: Place) -> Place:
    """Return a new temporary name beside ``target``."""
    return target.parent / f".{target.name}.{secrets.token_hex(8)}"


class Scratch:
    """A hidden, locked directory beside ``target``, to be renamed to it, or removed.

    Raises:
        WriteError: it cannot be made.
    """

    def __init__(self, target: Place) -> None:
        for _ in range(_TRIES):
            self.place = hidden(target)
            self.place.create_directory()
            self.lock: Lock | None = None
            try:
                self.lock = self.place.lock()
                return
            except BusyError:
                continue  # the sweep that holds it removes it
            except BaseException as error:
                if isinstance(error, WriteError) and error.errno == errno.ENOENT:
                    continue  # it was removed
                self.remove()
                raise
        raise WriteError(
            f"cannot create {self.place}: others lock or remove it, again and again",
            path=self.place.path,
            errno=None,
        )

    def unlock(self) -> None:
        """Let go of it: it has its name."""
        if self.lock is not None:
            self.lock.release()

    def remove(self) -> None:
        """Remove it; what cannot be removed is left for a sweep."""
        try:
            self.place.remove()
        except WriteError as cause:
            _log.warning("%s; the next run will", cause)
        finally:
            self.unlock()


class Draft:
    """One checkpoint on its way. Belongs to the event loop's thread; `io` does what blocks.

    Used with ``async with``: what was not published is undone when that is left.

    Args:
        max_file_bytes: longest data file; one that would become longer is followed by another.

    Attributes:
        nbytes: length of those it has written.
        write_seconds: time spent writing them.
        sync_seconds: time spent syncing them.
        published: the rename has happened, and nothing will be undone.
    """

    def __init__(
        self, target: Place, *, durable: bool, io: Executor, max_file_bytes: int = MAX_BYTES
    ) -> None:
        self.target = target
        self.nbytes = 0
        self.write_seconds = self.sync_seconds = 0.0
        self.published = False
        self._durable = durable
        self._io = io
        self._scratch: Scratch | None = None
        self._was_there = False  # whether something was at the target when this began
        self._max_file_bytes = max_file_bytes
        self._file: NewFile | None = None  # the one that it writes
        self._own: list[FileRecord] = []  # those that it has written
        self._linked: dict[int, FileRecord] = {}  # by the number in their names

    async def __aenter__(self) -> Self:
        """Make the directory and its data file.

        Raises:
            WriteError: they cannot be made; nothing is left of them.
        """
        with looking(self.target.path):
            self._was_there = await self._call(self.target.exists)
        self._scratch = await self._call(Scratch, self.target)
        try:
            await self._begin_file()
        except BaseException:
            await self._undo()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.published:
            await self._undo()

    async def append(self, frames: memoryview) -> tuple[int, int]:
        """Write a whole number of pages; return the file's number, and where they begin in it."""
        assert self._file is not None
        if self._file.nbytes and self._file.nbytes + frames.nbytes > self._max_file_bytes:
            await self._end_file()
            await self._begin_file()
        file = self._file
        offset, begun = file.nbytes, time.perf_counter()
        await file.append(frames)
        self.write_seconds += time.perf_counter() - begun
        self.nbytes += file.nbytes - offset
        return len(self._own), offset

    async def seal(self, rank_manifest: bytes, sidecars: Mapping[str, bytes]) -> None:
        """Write what is beside, and end this rank: only ``checkpoint.json`` is missing then."""
        for name, data in sidecars.items():
            await self._call(self._write, name, data)
        await self._call(self._write, rank_file(0), rank_manifest)

    @property
    def own_files(self) -> int:
        """How many data files it writes or has written."""
        return len(self._own) + 1

    # -- files of an earlier checkpoint --------------------------------------------------------

    async def link(self, files: Sequence[tuple[Place, FileRecord, Identity]]) -> dict[int, int]:
        """Give data files of an earlier checkpoint names in this one.

        Returns:
            Which of them have one, and the number in it. The others cannot have one, or are not
            what they were.
        """
        return await self._call(self._link, files)

    def linked(self, number: int) -> Place:
        """Return where such a file is."""
        assert self._scratch is not None
        return self._scratch.place / self._linked[number].name

    async def keep(self, numbers: Collection[int]) -> None:
        """Take the names of all other files away again."""
        for number in self._linked.keys() - set(numbers):
            await self._call(self.linked(number).remove_file)
            del self._linked[number]

    async def end_data(self) -> list[FileRecord]:
        """Sync and close its data files; return the records of all: own ones, then linked ones."""
        await self._end_file()
        return self._own + [self._linked[number] for number in sorted(self._linked)]

    async def identities(self, files: Sequence[FileRecord]) -> list[Identity]:
        """Return what tells data files from others that might have their names."""
        assert self._scratch is not None
        place = self._scratch.place
        return await self._call(lambda: [(place / each.name).identity() for each in files])

    async def publish(self, record: bytes, *, replace: bool) -> None:
        """Write ``checkpoint.json`` and give the directory its name.

        Raises:
            WriteError: not committed.
            CheckpointExistsError: not committed; something came to be at the target meanwhile, and
                is not to be replaced, or is no checkpoint.
            CommitError: renamed, and what comes after that has failed.
        """
        await self._call(self._publish, record, replace)

    # -- io threads -----------------------------------------------------------------------------

    def _link(self, files: Sequence[tuple[Place, FileRecord, Identity]]) -> dict[int, int]:
        assert self._scratch is not None
        found = {}
        for number, (file, record, identity) in enumerate(files):
            target = self._scratch.place / linked_file(0, number)
            if file.disk is not target.disk or identity is None:
                continue
            try:
                file.link(target, sync=self._durable)
                if target.identity() != identity:
                    target.remove_file()
                    continue
            except (WriteError, LoadError) as error:
                _log.debug("%s is written anew: %s", record.name, error)
                continue
            self._linked[number] = FileRecord(name=target.name, length=record.length, linked=True)
            found[number] = number
        return found

    def _write(self, name: str, data: bytes) -> None:
        assert self._scratch is not None
        (self._scratch.place / name).write_file(data, sync=self._durable)

    def _publish(self, record: bytes, replace: bool) -> None:
        assert self._scratch is not None
        self._write(CHECKPOINT_FILE, record)
        if self._durable:
            self._scratch.place.sync()  # DURABILITY: all entries before the rename
        old = self._rename(self._scratch.place, replace)  # COMMIT POINT
        self.published = True
        try:
            self._scratch.unlock()
            if self._durable:
                self.target.parent.sync()  # DURABILITY: the rename itself
        except Exception as cause:  # whatever it is, it must not be told as "not committed"
            why = str(cause) or repr(cause)
            raise CommitError(
                f"{self.target} is in place, but its name may not be on disk: {why}. It can be "
                "loaded now; whether it would survive a power cut is not known"
            ) from cause
        if old is not None:
            _discard(old, self.target)

    def _rename(self, scratch: Place, replace: bool) -> Place | None:
        """Put the scratch in place; return the hidden name of what it replaced, if anything."""
        target = self.target
        try:
            scratch.rename(target)
            return None
        except WriteError as cause:
            with looking(target.path):
                if not target.exists():
                    raise
                # what was there when this began was looked at then
                known = self._was_there or (target / CHECKPOINT_FILE).exists()
            if not (replace and known):
                raise CheckpointExistsError(
                    f"{target} came to be while it was being saved; it was left as it is"
                ) from cause
        if scratch.exchange(target):
            return scratch
        # no atomic swap: for a moment neither is there by name, and a sweep puts the old one back
        old = target.parent / f"{hidden(target).name}{REPLACED}"
        target.rename(old)
        try:
            scratch.rename(target)
        except BaseException:
            old.rename(target)
            raise
        return old

    async def _begin_file(self) -> None:
        assert self._scratch is not None
        name = data_file(0, len(self._own))
        self._file = await (self._scratch.place / name).create(self._io)

    async def _end_file(self) -> None:
        file = self._file
        assert file is not None
        if self._durable:
            begun = time.perf_counter()
            await file.sync()  # DURABILITY: every frame
            self.sync_seconds += time.perf_counter() - begun
        self._file = None
        await file.close()
        name = data_file(0, len(self._own))
        self._own.append(FileRecord(name=name, length=file.nbytes))

    async def _undo(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(WriteError):
                await file.close()
        if self._scratch is not None:
            await self._call(self._scratch.remove)

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)


def _discard(old: Place, target: Place) -> None:
    """Remove what was replaced; what cannot be removed is left for a sweep."""
    with contextlib.suppress(WriteError):
        if old.name.endswith(REPLACED):  # by that name it would come back, should the new one go
            name = hidden(target)
            old.rename(name)
            old = name
        old.remove()
