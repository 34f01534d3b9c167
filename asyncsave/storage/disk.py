"""Disk: what is asked of a place where checkpoints are, in two protocols.

`Readable` is all that loading takes; a place that can only be read has no more. `Disk` is what
saving takes as well. The machine's own is in local.py; tests put others in front of it, which fail,
wait, or remember.

Methods raise OSError. `Place` (place.py) is the only one that calls them, and says it in our words;
so an error is translated once, and whoever writes a Disk need not know ours.

Who calls what: plain methods block, and are called by worker threads or by the reader. `create` and
the file it returns belong to the event loop's thread, and do their work in the executor they are
given.
"""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol


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


class WritableFile(Protocol):
    """A new file that is appended to, from page-aligned memory."""

    async def write(self, view: memoryview) -> int:
        """Append the beginning of ``view``, at least a byte; return how many bytes that was."""

    async def sync(self) -> None:
        """DURABILITY: on return the file's bytes and length are on the device."""

    async def close(self) -> None:
        """Close it; never raises for a file that was synced."""


class Lock(Protocol):
    """A held lock on a directory. The system lets go of it when the process ends, however."""

    def release(self) -> None:
        """Let go of it."""


class Readable(Protocol):
    def list_directory(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""

    def is_directory(self, path: Path, *, follow: bool = False) -> bool:
        """Whether there is a directory; a link to one is none, unless ``follow`` is on."""

    def exists(self, path: Path) -> bool:
        """Whether there is anything, a broken link included; OSError where that cannot be told."""

    def identity(self, path: Path) -> tuple[int, ...] | None:
        """Return what tells a regular file, as it is now, from any other; None: there is none."""

    def open(self, path: Path) -> ReadableFile:
        """Open a regular file for reading; links, pipes and devices are refused."""


class Disk(Readable, Protocol):
    def create_directory(self, path: Path) -> None:
        """Make one directory; FileExistsError if there is something."""

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        """Make a new file; FileExistsError if there is something."""

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        """Make a new small file with these bytes, and sync it."""

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        """Give a file a second name, and sync it; FileExistsError if there is something.

        Where it raises, there is no second name.
        """

    def remove_file(self, path: Path) -> None:
        """Remove one name of a file."""

    def sync_directory(self, path: Path) -> None:
        """DURABILITY: on return the directory's entries are on the device."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory; ``target`` must not be, or be an empty directory."""

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step; return False where the system cannot."""

    def free_bytes(self, path: Path) -> int:
        """Return how much can still be written on the disk of a directory."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with all that is in it; links are not followed."""

    def lock(self, path: Path) -> Lock | None:
        """Lock a directory against other lockers; None where the filesystem has no locks.

        BlockingIOError when somebody, in this process or another, holds it.
        """
