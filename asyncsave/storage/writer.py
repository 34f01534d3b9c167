"""Writer: frames to the data file, one after the other, each on its own 4096-byte page."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from pathlib import Path

from ..errors import write_error
from ..format.manifest import FRAME_ALIGNMENT
from .filesystem import FileSystem, WritableFile


def padded(length: int) -> int:
    """Return ``length`` rounded up to whole pages."""
    return -(-length // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


class DataWriter:
    """Appends to one new data file. Belongs to the event loop's thread.

    Attributes:
        nbytes: length of the file so far.
        write_seconds: time spent writing and syncing.
    """

    def __init__(self, path: Path, file: WritableFile) -> None:
        self._path = path
        self._file = file
        self.nbytes = 0
        self.write_seconds = 0.0

    @classmethod
    async def create(cls, filesystem: FileSystem, path: Path, executor: Executor) -> DataWriter:
        """Make the file; WriteError if it cannot be made."""
        try:
            return cls(path, await filesystem.create(path, executor))
        except OSError as cause:
            raise write_error("create", path, cause) from cause

    async def append(self, frame: memoryview) -> int:
        """Write a whole number of pages; return the offset they begin at."""
        begin = time.perf_counter()
        try:
            await self._file.write(frame)
        except OSError as cause:
            raise write_error("write", self._path, cause) from cause
        self.write_seconds += time.perf_counter() - begin
        offset = self.nbytes
        self.nbytes += frame.nbytes
        return offset

    async def sync(self) -> None:
        """DURABILITY: on return everything that was appended is on the device.

        A failure is final: after a failed fsync the system may have dropped the pages and call the
        next one a success, so the file must be abandoned (as PostgreSQL learned in 2018).
        """
        begin = time.perf_counter()
        try:
            await self._file.sync()
        except OSError as cause:
            raise write_error("sync", self._path, cause) from cause
        self.write_seconds += time.perf_counter() - begin

    async def close(self) -> None:
        """Close the file."""
        try:
            await self._file.close()
        except OSError as cause:
            raise write_error("close", self._path, cause) from cause
