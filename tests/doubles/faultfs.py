"""FaultFileSystem: the machine's files, one operation of which misbehaves on command.

`Faults` numbers the operations, remembers them, and says which one fails and how; so that a test
can let the i-th operation fail for every i there is.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asyncsave.storage.filesystem import LocalFileSystem, Lock, ReadableFile, WritableFile

Fault = int | Literal["short", "flip", "delay"]
"""An errno to raise; or write or read less than was asked for; or flip a bit; or take long."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. ``path`` is the new name of a rename; ``offset`` and ``length`` are in bytes."""

    kind: str
    path: Path
    offset: int = 0
    length: int = 0


class Faults:
    """Which operation misbehaves, and how. Any thread may call.

    Args:
        at: the number of the operation, from 0 on; -1 for none.
        fault: what happens to it. Operations that it cannot happen to are left alone.
        lasting: all operations after it fail, too, as if the process had been killed there.
        where: the byte that is flipped, as a share of the operation's length.

    Attributes:
        on: operations count only while this is set.
        operations: all that were counted.
        hit: the one that misbehaved, once it has.
    """

    def __init__(
        self, at: int = -1, fault: Fault = 0, *, lasting: bool = False, where: float = 0.5
    ) -> None:
        self.at, self.fault, self.lasting, self.where = at, fault, lasting, where
        self.on = True
        self.operations: list[Operation] = []
        self.hit: Operation | None = None
        self._lock = threading.Lock()

    def meet(self, kind: str, path: Path, offset: int = 0, length: int = 0) -> Fault | None:
        """Count an operation; return what the caller is to do to it, or raise."""
        with self._lock:
            if not self.on:
                return None
            number = len(self.operations)
            operation = Operation(kind, path, offset, length)
            self.operations.append(operation)
            if number != self.at and not (self.lasting and 0 <= self.at < number):
                return None
            if isinstance(self.fault, int):
                self.hit = self.hit or operation
                raise OSError(self.fault, os.strerror(self.fault), str(path))
            if self.fault == "delay":
                self.hit = operation
        if self.fault == "delay":
            time.sleep(0.02)
            return None
        if length < 2 or (kind == "write_file" and self.fault == "short"):
            return None  # nothing to flip, or to cut short
        self.hit = operation
        return self.fault

    def flip(self, view: memoryview) -> None:
        """Flip a bit of the byte at ``where``."""
        view[int(self.where * (view.nbytes - 1))] ^= 1


class FaultFileSystem(LocalFileSystem):
    """Every operation asks ``faults`` first. `exists` never fails: nor does what it stands for."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def create_directory(self, path: Path) -> None:
        self.faults.meet("create_directory", path)
        super().create_directory(path)

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        self.faults.meet("create", path)
        return _FaultyWritable(await super().create(path, executor), path, self.faults)

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        if self.faults.meet("write_file", path, 0, len(data)) == "flip":
            flipped = bytearray(data)
            self.faults.flip(memoryview(flipped))
            data = bytes(flipped)
        super().write_file(path, data, sync=sync)

    def sync_directory(self, path: Path) -> None:
        self.faults.meet("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.faults.meet("rename", target)
        super().rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        self.faults.meet("exchange", other)
        return super().exchange(one, other)

    def remove_tree(self, path: Path) -> None:
        try:
            self.faults.meet("remove_tree", path)
        except OSError:
            files = sorted(each for each in path.rglob("*") if each.is_file())
            if files and not self.faults.lasting:  # it fails half-way
                self.remove_file(files[0])
            raise
        super().remove_tree(path)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def list_directory(self, path: Path) -> list[str]:
        self.faults.meet("list_directory", path)
        return super().list_directory(path)

    def is_directory(self, path: Path) -> bool:
        self.faults.meet("is_directory", path)
        return super().is_directory(path)

    def open(self, path: Path) -> ReadableFile:
        self.faults.meet("open", path)
        return _FaultyReadable(super().open(path), path, self.faults)

    def lock(self, path: Path) -> Lock | None:
        self.faults.meet("lock", path)
        return super().lock(path)


class _FaultyWritable:
    def __init__(self, file: Any, path: Path, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults
        self._offset = 0

    async def write(self, view: memoryview) -> None:
        fault = self._faults.meet("write", self._path, self._offset, view.nbytes)
        self._offset += view.nbytes
        if fault == "flip":
            self._faults.flip(view)
            await self._file.write(view)
            self._faults.flip(view)
            return
        if fault == "short":
            # below the loop that is to cope with it: the system takes less than it is given
            whole, self._file._file = self._file._file, _ShortOnce(self._file._file)
            await self._file.write(view)
            self._file._file = whole
            return
        await self._file.write(view)

    async def sync(self) -> None:
        self._faults.meet("sync", self._path)
        await self._file.sync()

    async def close(self) -> None:
        await self._file.close()
        self._faults.meet("close", self._path)


class _ShortOnce:
    """The file below a writable, which takes 1000 bytes the first time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._done = False

    async def write(self, view: memoryview) -> Any:
        if self._done:
            return await self._file.write(view)
        self._done = True
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
        count = await self._file.write(view[:1000])
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags)
        return count


class _FaultyReadable:
    def __init__(self, file: ReadableFile, path: Path, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults
        self.nbytes = file.nbytes

    def read_into(self, offset: int, view: memoryview) -> int:
        fault = self._faults.meet("read", self._path, offset, view.nbytes)
        if fault == "short":
            view = view[:-1]
        count = self._file.read_into(offset, view)
        if fault == "flip":
            self._faults.flip(view)
        return count

    def skip_hole(self, offset: int) -> int:
        return self._file.skip_hole(offset)

    def is_cached(self, offset: int, nbytes: int) -> bool:
        return self._file.is_cached(offset, nbytes)

    def close(self) -> None:
        self._file.close()
