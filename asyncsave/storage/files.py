"""Files of a checkpoint, open: what a Disk gives, with errors in asyncsave's words."""

from __future__ import annotations

import errno
from pathlib import Path

from ..errors import IntegrityError, LoadError, asking
from .disk import ReadableFile, WritableFile

_NOT_DAMAGE = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
}
"""Refusals that say nothing of the bytes: to go on from an older checkpoint would lose work."""


class File:
    """An open file; many threads may read from it at once.

    Attributes:
        path: where it is.
        nbytes: its length.
    """

    def __init__(self, path: Path, file: ReadableFile) -> None:
        self.path = path
        self.nbytes = file.nbytes
        self.skip_hole = file.skip_hole
        self.is_cached = file.is_cached
        self.close = file.close
        self._read_into = file.read_into

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from byte ``offset`` on; return how much there was.

        Raises:
            IntegrityError: the bytes cannot be read.
            LoadError: they cannot be read now.
        """
        try:
            return self._read_into(offset, view)
        except OSError as cause:
            raise read_error("read", self.path, offset, cause) from cause


def read_error(done: str, path: Path, offset: int, cause: OSError) -> LoadError:
    """Return the LoadError that says ``cause`` in asyncsave's words; raise it ``from cause``."""
    if cause.errno in _NOT_DAMAGE:
        return LoadError(f"{path} cannot be {done} now: {cause.strerror or cause}")
    return IntegrityError(
        f"{path} cannot be {done} at offset {offset}: {cause}", path=path, offset=offset
    )


class NewFile:
    """A file that is appended to. Belongs to the event loop's thread.

    Attributes:
        path: where it is.
        nbytes: its length so far.
    """

    def __init__(self, path: Path, file: WritableFile) -> None:
        self.path = path
        self.nbytes = 0
        self._file = file

    async def append(self, view: memoryview) -> None:
        """Write all of ``view``, however little the system takes at once."""
        done = 0
        with asking("write", self.path):
            while done < view.nbytes:
                done += await self._file.write(view[done:])
        self.nbytes += done

    async def sync(self) -> None:
        """DURABILITY: on return everything that was appended is on the device.

        A failure is final: after a failed fsync the system may have dropped the pages and call the
        next one a success, so the file must be abandoned (as PostgreSQL learned in 2018).
        """
        with asking("sync", self.path):
            await self._file.sync()

    async def close(self) -> None:
        """Close it."""
        with asking("close", self.path):
            await self._file.close()
