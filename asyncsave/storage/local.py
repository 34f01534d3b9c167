"""LocalDisk: the machine's files; the only importer of aiofiles. Reading is in direct.py."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import weakref
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, ClassVar

import aiofiles

from ..pages import PAGE_BYTES
from .direct import LocalReadable
from .disk import Lock, ReadableFile, WritableFile

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


class LocalDisk:
    """The machine's files. Data files are written with O_DIRECT where the filesystem takes it."""

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

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        os.link(source, target, follow_symlinks=False)
        if not sync:
            return
        try:  # it may have been written by a process that did not
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            os.unlink(target)
            raise

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

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

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def list_directory(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def is_directory(self, path: Path, *, follow: bool = False) -> bool:
        return path.is_dir() and (follow or not path.is_symlink())

    def exists(self, path: Path) -> bool:
        try:  # not os.path.lexists(), to which whatever cannot be looked at is not there
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def identity(self, path: Path) -> tuple[int, ...] | None:
        try:
            about = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(about.st_mode):
            return None
        # not the time of its last change of any kind, which a second name is
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def open(self, path: Path) -> ReadableFile:
        return LocalReadable(path)

    def lock(self, path: Path) -> Lock | None:
        lock = _LocalLock()
        try:
            lock.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not lock.take():
                return None
            if not os.fstat(lock.descriptor).st_nlink:  # removed before it was locked
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
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
        self._offset = 0
        self._descriptor: int = file.fileno()

    async def write(self, view: memoryview) -> int:
        if self._offset % PAGE_BYTES:
            self._go_buffered()  # after a short write, what follows is unaligned
        try:
            count: int = await self._file.write(view)
        except OSError as refused:
            if refused.errno != errno.EINVAL or not self._direct:
                raise
            self._go_buffered()
            count = await self._file.write(view)
        self._offset += count
        return count

    def _go_buffered(self) -> None:
        if not self._direct:
            return
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

LOCAL = LocalDisk()
"""It has no state, so one serves all."""
