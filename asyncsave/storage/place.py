"""Place: where a checkpoint or a run is, on which disk; and what its disk refuses, in our words.

This is the seam. A Disk raises OSError; a Place says once what that means: to who saves a
`WriteError`, to who loads an `IntegrityError` where the bytes are not there or not readable, and a
`LoadError` where that says nothing of the bytes (no permission, no descriptors, a network that is
away): to go on from an older checkpoint would lose work then.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BusyError, ConfigError, IntegrityError, LoadError, asking
from .disk import Disk, Lock
from .files import File, NewFile, read_error
from .local import LOCAL

PathLike = str | os.PathLike[str]
"""What people give; a `Place` is one, too."""

# Also what pathlib makes of one: Path("s3://bucket/a") is "s3:/bucket/a". A drive's letter is none.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP}
"""Why a directory that was there before may not be synced, or cannot."""


Identity = tuple[int, ...] | None
"""What tells a file from another one of its name; None: there is none."""


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a disk, with what can be done there. Any thread may call any method.

    Methods that look raise LoadError; those that change anything raise WriteError.
    """

    path: Path
    disk: Disk = field(default=LOCAL, compare=False, repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Place:
        return Place(self.path / name, self.disk)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> Place:
        return Place(self.path.parent, self.disk)

    # -- looking --------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is anything, a broken link included."""
        with self._looking():
            return self.disk.exists(self.path)

    def is_directory(self, *, follow: bool = False) -> bool:
        """Whether there is a directory; a link to one is none, unless ``follow`` is on."""
        with self._looking():
            return self.disk.is_directory(self.path, follow=follow)

    def free_bytes(self) -> int:
        """Return how much can still be written on the disk of a directory."""
        with self._looking():
            return self.disk.free_bytes(self.path)

    def identity(self) -> Identity:
        """Return what tells a regular file, as it is now, from any other; None: there is none."""
        with self._looking():
            return self.disk.identity(self.path)

    def names(self) -> list[str]:
        """Return the names in a directory, sorted; [] where there is no directory."""
        with self._looking():
            try:
                return self.disk.list_directory(self.path)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def open(self) -> File:
        """Open a regular file for reading.

        Raises:
            IntegrityError: there is none, or it cannot be opened, and never will be.
            LoadError: it cannot be opened now.
        """
        try:
            return File(self.path, self.disk.open(self.path))
        except FileNotFoundError as cause:
            raise IntegrityError(f"{self} is missing", path=self.path, offset=0) from cause
        except OSError as cause:
            raise read_error("opened", self.path, 0, cause) from cause

    @contextmanager
    def _looking(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise LoadError(f"{self} cannot be read: {cause.strerror or cause}") from cause
        except ValueError as cause:  # a NUL in the path
            raise LoadError(f"{self} cannot be looked into: {cause}") from cause

    # -- changing -------------------------------------------------------------------------------

    def make_directories(self) -> None:
        """Make a directory and its parents, durably; those that exist are fine."""
        with asking("create", self.path):
            missing, current = [], self.path
            while not self.disk.is_directory(current, follow=True) and current != current.parent:
                missing.append(current)
                current = current.parent
            try:
                # it may have been made a moment ago, by somebody who did not sync its name
                self.disk.sync_directory(current.parent)
            except OSError as refused:
                if refused.errno not in _NOT_OURS:
                    raise
            for each in reversed(missing):
                try:
                    self.disk.create_directory(each)
                except FileExistsError:
                    if not self.disk.is_directory(each, follow=True):
                        raise
                self.disk.sync_directory(each.parent)

    def create_directory(self) -> None:
        """Make one directory, which was not there."""
        with asking("create", self.path):
            self.disk.create_directory(self.path)

    async def create(self, executor: Executor) -> NewFile:
        """Make a new file; the executor's threads will write it."""
        with asking("create", self.path):
            return NewFile(self.path, await self.disk.create(self.path, executor))

    def write_file(self, data: bytes, *, sync: bool) -> None:
        """Make a new small file with these bytes, and sync it."""
        with asking("write", self.path):
            self.disk.write_file(self.path, data, sync=sync)

    def link(self, target: Place, *, sync: bool) -> None:
        """Give a file a second name, synced; where it raises, there is none."""
        with asking("link", target.path):
            self.disk.link(self.path, target.path, sync=sync)

    def remove_file(self) -> None:
        """Remove one name of a file."""
        with asking("remove", self.path):
            self.disk.remove_file(self.path)

    def sync(self) -> None:
        """DURABILITY: on return the directory's entries are on the device."""
        with asking("sync", self.path):
            self.disk.sync_directory(self.path)

    def rename(self, target: Place) -> None:
        """Give a directory another name; there is nothing, or an empty directory."""
        with asking("rename to", target.path):
            self.disk.rename(self.path, target.path)

    def exchange(self, other: Place) -> bool:
        """Swap two names in one step; return False where the system cannot."""
        with asking("replace", other.path):
            return self.disk.exchange(self.path, other.path)

    def remove(self) -> None:
        """Remove a directory with all that is in it; links are not followed."""
        with asking("remove", self.path):
            self.disk.remove_tree(self.path)

    def lock(self) -> Lock | None:
        """Lock a directory against other lockers; None where the filesystem has no locks.

        Raises:
            BusyError: somebody, in this process or another, holds it.
        """
        with asking("lock", self.path):
            try:
                return self.disk.lock(self.path)
            except BlockingIOError as cause:
                raise BusyError(f"{self} is in use") from cause


def place_of(path: PathLike) -> Place:
    """Return the place that ``path`` says: with ``~`` expanded, and absolute; a Place as it is.

    It looks at nothing but the names of the current directory and the home.

    Raises:
        ConfigError: it is a URL, or no path at all.
    """
    if isinstance(path, Place):
        return path
    try:
        text = os.fspath(path)
    except TypeError as cause:
        raise ConfigError(
            f"a path is wanted, a str or a pathlib.Path, not {path!r:.80}, "
            f"which is a {type(path).__name__}"
        ) from cause
    if not isinstance(text, str) or "\0" in text or not text:
        raise ConfigError(f"{text!r:.80} cannot be a path: give a str, or a pathlib.Path")
    scheme = _SCHEME.match(text)
    if scheme:
        raise ConfigError(
            f"{text!r:.200} is a URL, and nothing here handles {scheme[1]}://. Save to a local "
            "directory, or to where that storage is mounted"
        )
    try:
        return Place(Path(os.path.abspath(Path(text).expanduser())))
    except RuntimeError as cause:
        raise ConfigError(f"{text!r:.200}: there is no such home directory") from cause
    except OSError as cause:
        raise ConfigError(
            f"{text!r:.200} is a path from the current directory, which is gone: give a whole one"
        ) from cause
