"""FaultDisk: a disk one operation of which misbehaves on command.

`Faults` numbers the operations, remembers them, and says which one fails and how; so that a test
can let the i-th operation fail for every i there is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asyncsave.storage.disk import Disk, Lock, ReadableFile, WritableFile
from asyncsave.storage.local import LOCAL
from tests.doubles.disks import WrappedDisk, WrappedFile, WrappedReadable

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
        kinds: the operations that count, by what `Operation.kind` says; None: all do.

    Attributes:
        on: operations count only while this is set.
        operations: all that were counted.
        hit: the one that misbehaved, once it has.
    """

    def __init__(
        self,
        at: int = -1,
        fault: Fault = 0,
        *,
        lasting: bool = False,
        where: float = 0.5,
        kinds: Collection[str] | None = None,
    ) -> None:
        self.at, self.fault, self.lasting, self.where = at, fault, lasting, where
        self.kinds = kinds
        self.on = True
        self.operations: list[Operation] = []
        self.hit: Operation | None = None
        self._lock = threading.Lock()

    def meet(self, kind: str, path: Path, offset: int = 0, length: int = 0) -> Fault | None:
        """Count an operation; return what the caller is to do to it, or raise."""
        with self._lock:
            if not self.on or (self.kinds is not None and kind not in self.kinds):
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


class FaultDisk(WrappedDisk):
    """Every operation asks ``faults`` first."""

    def __init__(self, faults: Faults, disk: Disk = LOCAL) -> None:
        super().__init__(disk)
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

    def identity(self, path: Path) -> tuple[int, ...] | None:
        self.faults.meet("identity", path)
        return super().identity(path)

    def remove_file(self, path: Path) -> None:
        self.faults.meet("remove_file", path)
        super().remove_file(path)

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        self.faults.meet("link", target)
        super().link(source, target, sync=sync)

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
            if files and not self.faults.lasting:
                files[0].unlink()  # it fails half-way
            raise
        super().remove_tree(path)

    def list_directory(self, path: Path) -> list[str]:
        self.faults.meet("list_directory", path)
        return super().list_directory(path)

    def is_directory(self, path: Path, *, follow: bool = False) -> bool:
        self.faults.meet("is_directory", path)
        return super().is_directory(path, follow=follow)

    def free_bytes(self, path: Path) -> int:
        self.faults.meet("free_bytes", path)
        return super().free_bytes(path)

    def open(self, path: Path) -> ReadableFile:
        self.faults.meet("open", path)
        return _FaultyReadable(super().open(path), path, self.faults)

    def lock(self, path: Path) -> Lock | None:
        self.faults.meet("lock", path)
        return super().lock(path)


class BlindDisk(FaultDisk):
    """Whether something is there is an operation, too, that may fail."""

    def exists(self, path: Path) -> bool:
        self.faults.meet("exists", path)
        return super().exists(path)


class _FaultyWritable(WrappedFile):
    def __init__(self, file: WritableFile, path: Path, faults: Faults) -> None:
        super().__init__(file)
        self._path, self._faults = path, faults
        self._offset = 0

    async def write(self, view: memoryview) -> int:
        fault = self._faults.meet("write", self._path, self._offset, view.nbytes)
        if fault == "short":  # the system takes less than it is given
            view = view[:1000]
        if fault == "flip":
            self._faults.flip(view)
        count = await super().write(view)
        if fault == "flip":
            self._faults.flip(view)
        self._offset += count
        return count

    async def sync(self) -> None:
        self._faults.meet("sync", self._path)
        await super().sync()

    async def close(self) -> None:
        await super().close()
        self._faults.meet("close", self._path)


class _FaultyReadable(WrappedReadable):
    def __init__(self, file: ReadableFile, path: Path, faults: Faults) -> None:
        super().__init__(file)
        self._path, self._faults = path, faults

    def read_into(self, offset: int, view: memoryview) -> int:
        fault = self._faults.meet("read", self._path, offset, view.nbytes)
        if fault == "short":
            view = view[:-1]
        count = super().read_into(offset, view)
        if fault == "flip":
            self._faults.flip(view)
        return count
