"""FileSystem: every touch of the disk, behind one protocol; the only importer of aiofiles.

`LocalFileSystem` is the one that is used. Tests put others in its place, which fail, lie or
remember. Methods raise OSError; the stages that call them translate it. Reading back is in
direct.py.

Who calls what: plain methods block, and are called by worker threads or by the reader. `create` and
the file it returns belong to the event loop's thread, and do their work in the executor they are
given.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import shutil
import weakref
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, ClassVar, Protocol

import aiofiles

from .direct import LocalReadable

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP}
"""Why a directory that was there before may not be synced, or cannot."""


class WritableFile(Protocol):
    """A new file that is appended to, in multiples of 4096 bytes from page-aligned memory."""

    async def write(self, view: memoryview) -> None:
        """Append all of ``view``."""

    async def sync(self) -> None:
        """DURABILITY: on return the file's bytes and length are on the device."""

    async def close(self) -> None:
        """Close it; never raises for a file that was synced."""


class ReadableFile(Protocol):
    """An open file; safe to read from many threads at once."""

    @property
    def nbytes(self) -> int:
        """Its length."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``; return how many bytes there were."""

    def skip_hole(self, offset: int) -> int:
        """Return the first offset from this one on that may hold anything but zeros."""

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether most of these bytes come from memory; True where nobody can tell."""

    def close(self) -> None:
        """Close it."""


class Lock(Protocol):
    """A held lock on a directory. The system lets go of it when the process ends, however."""

    def release(self) -> None:
        """Let go of it."""


class FileSystem(Protocol):
    def make_directories(self, path: Path) -> None:
        """Make a directory and its parents, durably; those that exist are fine."""

    def create_directory(self, path: Path) -> None:
        """Make one directory; FileExistsError if there is something."""

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        """Make a new file; FileExistsError if there is something."""

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        """Make a new small file with these bytes, and sync it."""

    def sync_directory(self, path: Path) -> None:
        """DURABILITY: on return the directory's entries are on the device."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory; ``target`` must not be, or be an empty directory."""

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step; return False where the system cannot."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with all that is in it; links are not followed."""

    def list_directory(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""

    def is_directory(self, path: Path) -> bool:
        """Whether there is a directory (a link to one is none)."""

    def exists(self, path: Path) -> bool:
        """Whether there is anything, a broken link included."""

    def open(self, path: Path) -> ReadableFile:
        """Open a regular file for reading; links, pipes and devices are refused."""

    def lock(self, path: Path) -> Lock | None:
        """Lock a directory against other lockers; None where the filesystem has no locks.

        BlockingIOError when somebody, in this process or another, holds it.
        """


class LocalFileSystem:
    """The machine's files. Data files are written with O_DIRECT where the filesystem takes it."""

    def make_directories(self, path: Path) -> None:
        missing = []
        current = path
        while not current.is_dir() and current != current.parent:
            missing.append(current)
            current = current.parent
        try:
            # it may have been made a moment ago, by somebody who did not sync its name
            self.sync_directory(current.parent)
        except OSError as refused:
            if refused.errno not in _NOT_OURS:
                raise
        for each in reversed(missing):
            try:
                self.create_directory(each)
            except FileExistsError:
                if not each.is_dir():
                    raise
            self.sync_directory(each.parent)

    def create_directory(self, path: Path) -> None:
        path.mkdir()

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        try:
            file = await _open_direct(path, executor)
        except OSError as refused:
            if refused.errno != errno.EINVAL:
                raise
            # the filesystem does not know O_DIRECT, but may have made the file
            path.unlink(missing_ok=True)
            opened = await aiofiles.open(path, "xb", buffering=0, executor=executor)
            return _LocalWritable(opened, executor, direct=False)
        return _LocalWritable(file, executor, direct=True)

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        with open(path, "xb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if sync:
                os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is None:
            return False
        names = os.fsencode(one), os.fsencode(other)
        if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise OSError(number, os.strerror(number), str(one))

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def list_directory(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def is_directory(self, path: Path) -> bool:
        return path.is_dir() and not path.is_symlink()

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def open(self, path: Path) -> ReadableFile:
        return LocalReadable(path)

    def lock(self, path: Path) -> Lock | None:
        lock = _LocalLock()
        try:
            lock.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not lock.take():
                return None
        except BaseException:  # an interrupt, too, must not leave it locked
            lock.release()
            raise
        return lock


async def _open_direct(path: Path, executor: Executor) -> Any:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_DIRECT, 0o666)

    return await aiofiles.open(path, "xb", buffering=0, opener=opener, executor=executor)


class _LocalWritable:
    def __init__(self, file: Any, executor: Executor, *, direct: bool) -> None:
        self._file = file
        self._executor = executor
        self._direct = direct
        self._descriptor: int = file.fileno()

    async def write(self, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            try:
                count = await self._file.write(view[done:])
            except OSError as refused:
                if refused.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_buffered()
                continue
            if count % 4096 and self._direct:
                # a short write has left the file unaligned: what follows cannot be direct
                self._go_buffered()
            done += count

    def _go_buffered(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    async def sync(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, os.fsync, self._descriptor)
        if not self._direct:
            # written through the page cache, which the training needs more
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    async def close(self) -> None:
        await self._file.close()


class _LocalLock:
    """flock(2) on the directory itself: no lock file, and gone when the process is."""

    _held: ClassVar[weakref.WeakSet[_LocalLock]] = weakref.WeakSet()

    descriptor: int | None = None

    def __init__(self) -> None:
        self._held.add(self)

    def take(self) -> bool:
        """Lock it; whether the filesystem has locks. BlockingIOError: somebody else holds it."""
        assert self.descriptor is not None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked child: close the descriptor, or the lock would outlive the parent."""
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=_LocalLock.leave_to_parent)
