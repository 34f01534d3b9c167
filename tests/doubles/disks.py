"""Disks in front of other disks; they come in by the door: ``Checkpointer(disk.at(path))``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from asyncsave.storage.disk import Disk, Lock, ReadableFile, WritableFile
from asyncsave.storage.local import LOCAL
from asyncsave.storage.place import Place


class WrappedDisk:
    """Passes everything on to another disk; others change some of it."""

    def __init__(self, disk: Disk = LOCAL) -> None:
        self.inner = disk

    def at(self, path: Path) -> Place:
        """Return a place on this disk."""
        return Place(path, self)

    def list_directory(self, path: Path) -> list[str]:
        return self.inner.list_directory(path)

    def is_directory(self, path: Path, *, follow: bool = False) -> bool:
        return self.inner.is_directory(path, follow=follow)

    def exists(self, path: Path) -> bool:
        return self.inner.exists(path)

    def open(self, path: Path) -> ReadableFile:
        return self.inner.open(path)

    def create_directory(self, path: Path) -> None:
        self.inner.create_directory(path)

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return await self.inner.create(path, executor)

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        self.inner.write_file(path, data, sync=sync)

    def identity(self, path: Path) -> tuple[int, ...] | None:
        return self.inner.identity(path)

    def remove_file(self, path: Path) -> None:
        self.inner.remove_file(path)

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        self.inner.link(source, target, sync=sync)

    def sync_directory(self, path: Path) -> None:
        self.inner.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.inner.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        return self.inner.exchange(one, other)

    def free_bytes(self, path: Path) -> int:
        return self.inner.free_bytes(path)

    def remove_tree(self, path: Path) -> None:
        self.inner.remove_tree(path)

    def lock(self, path: Path) -> Lock | None:
        return self.inner.lock(path)


class WrappedFile:
    """A new file that passes everything on."""

    def __init__(self, file: WritableFile) -> None:
        self.inner = file

    async def write(self, view: memoryview) -> int:
        return await self.inner.write(view)

    async def sync(self) -> None:
        await self.inner.sync()

    async def close(self) -> None:
        await self.inner.close()


class GatedDisk(WrappedDisk):
    """Data is written only while ``gate`` is set; so a save can be held in flight."""

    def __init__(self, disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.gate = threading.Event()

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return _GatedFile(await super().create(path, executor), self.gate, executor)


class _GatedFile(WrappedFile):
    def __init__(self, file: WritableFile, gate: threading.Event, executor: Executor) -> None:
        super().__init__(file)
        self._gate, self._executor = gate, executor

    async def write(self, view: memoryview) -> int:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._gate.wait)
        return await super().write(view)


class SlowDisk(WrappedDisk):
    """Writing a byte takes ``seconds_per_byte`` more than on the disk behind it."""

    def __init__(self, seconds_per_byte: float, disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.seconds_per_byte = seconds_per_byte

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return _SlowFile(await super().create(path, executor), self.seconds_per_byte)


class _SlowFile(WrappedFile):
    def __init__(self, file: WritableFile, seconds_per_byte: float) -> None:
        super().__init__(file)
        self._seconds_per_byte = seconds_per_byte

    async def write(self, view: memoryview) -> int:
        count = await super().write(view)
        await asyncio.sleep(self._seconds_per_byte * count)
        return count


class SmallDisk(WrappedDisk):
    """Has room for ``nbytes`` more, as it says."""

    def __init__(self, nbytes: int, disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.nbytes = nbytes

    def free_bytes(self, path: Path) -> int:
        return self.nbytes


class NoExchangeDisk(WrappedDisk):
    """A system that cannot swap two names in one step."""

    def exchange(self, one: Path, other: Path) -> bool:
        return False


class WrappedReadable:
    """A file open for reading that passes everything on."""

    def __init__(self, file: ReadableFile) -> None:
        self.inner = file
        self.nbytes = file.nbytes

    def read_into(self, offset: int, view: memoryview) -> int:
        return self.inner.read_into(offset, view)

    def skip_hole(self, offset: int) -> int:
        return self.inner.skip_hole(offset)

    def is_cached(self, offset: int, nbytes: int) -> bool:
        return self.inner.is_cached(offset, nbytes)

    def close(self) -> None:
        self.inner.close()


class AskingDisk(WrappedDisk):
    """Calls ``ask(what, path)`` before it does something, in the thread that does it.

    So ``ask`` may refuse (by raising), wait, or count. ``what`` is the name of the method, or of a
    file's: "write", "sync", "read_into". The path of a rename or an exchange is the new name.
    """

    def __init__(self, ask: Callable[[str, Path], object], disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.ask = ask

    def list_directory(self, path: Path) -> list[str]:
        self.ask("list_directory", path)
        return super().list_directory(path)

    def exists(self, path: Path) -> bool:
        self.ask("exists", path)
        return super().exists(path)

    def open(self, path: Path) -> ReadableFile:
        self.ask("open", path)
        return _AskingReadable(super().open(path), path, self.ask)

    def create_directory(self, path: Path) -> None:
        self.ask("create_directory", path)
        super().create_directory(path)

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        self.ask("create", path)
        return _AskingFile(await super().create(path, executor), path, self.ask, executor)

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        self.ask("write_file", path)
        super().write_file(path, data, sync=sync)

    def sync_directory(self, path: Path) -> None:
        self.ask("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.ask("rename", target)
        super().rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        self.ask("exchange", other)
        return super().exchange(one, other)

    def remove_tree(self, path: Path) -> None:
        self.ask("remove_tree", path)
        super().remove_tree(path)

    def lock(self, path: Path) -> Lock | None:
        self.ask("lock", path)
        return super().lock(path)


class _AskingFile(WrappedFile):
    def __init__(
        self,
        file: WritableFile,
        path: Path,
        ask: Callable[[str, Path], object],
        executor: Executor,
    ) -> None:
        super().__init__(file)
        self._path, self._ask, self._executor = path, ask, executor

    async def _asks(self, what: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._ask, what, self._path)

    async def write(self, view: memoryview) -> int:
        await self._asks("write")
        return await super().write(view)

    async def sync(self) -> None:
        await self._asks("sync")
        await super().sync()


class _AskingReadable(WrappedReadable):
    def __init__(self, file: ReadableFile, path: Path, ask: Callable[[str, Path], object]) -> None:
        super().__init__(file)
        self._path, self._ask = path, ask

    def read_into(self, offset: int, view: memoryview) -> int:
        self._ask("read_into", self._path)
        return super().read_into(offset, view)


class WatchedDisk(WrappedDisk):
    """Knows who reads from the data files, and of whatever should not happen to them.

    Args:
        during: called by a reader that has read, before it returns.

    Attributes:
        reading: how many threads are reading now.
        reads: how many reads have ended.
        closed: files that were closed while somebody read from them.
    """

    def __init__(self, during: Callable[[], object], disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.during = during
        self.reading = self.reads = 0
        self.closed: list[Path] = []
        self.lock = threading.Lock()

    def open(self, path: Path) -> ReadableFile:
        file = super().open(path)
        return _WatchedReadable(file, path, self) if path.suffix == ".data" else file


class _WatchedReadable(WrappedReadable):
    def __init__(self, file: ReadableFile, path: Path, disk: WatchedDisk) -> None:
        super().__init__(file)
        self._path, self._disk = path, disk

    def read_into(self, offset: int, view: memoryview) -> int:
        with self._disk.lock:
            self._disk.reading += 1
        try:
            count = super().read_into(offset, view)
            self._disk.during()
            return count
        finally:
            with self._disk.lock:
                self._disk.reading -= 1
                self._disk.reads += 1

    def close(self) -> None:
        if self._disk.reading:
            self._disk.closed.append(self._path)
        super().close()
