"""Reuse: chunks whose bytes an earlier checkpoint has are not encoded and not written again.

What a chunk holds is told by its digest and its length, so that no change of it can be missed. Its
frame stays where it is, and its file gets a second name (a hard link) in the new checkpoint, which
so is whole by itself: what becomes of the earlier one, or when, does not matter to it. Nothing
counts references but the filesystem.

All files of the earlier checkpoint get their names first, before a chunk is looked up: what has no
name then, as where the filesystem has no links, is written as ever. A file is the one that was
written, told by its inode, length and time, or it is not taken from.

A linked file holds room for as long as any checkpoint has it, also for frames that nobody needs any
more. So one of which less than half is needed is not kept: what is needed of it is copied, frame by
frame, into the new checkpoint's own file. So the files of a checkpoint are never longer than twice
what it needs of them, and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoadError, SaveError
from ..format.records import ChunkRecord, FileRecord, digest
from ..pages import Bytes, padded
from ..state.changes import Versions
from ..state.chunks import Plan
from ..storage.files import File
from ..storage.place import Identity, Place

_LEAST_NEEDED = 0.5
"""A file is kept if so much of it is needed, or more."""

_MOST_KEPT = 256
"""Files at most: whoever reads the checkpoint opens them all."""

Content = tuple[str, int]
"""A chunk's digest, decoded, and its length."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a checkpoint has that the next one may take from it.

    Attributes:
        place: its directory.
        files: its data files.
        identities: what tells each of them from another one of its name.
        chunks: its chunks, by what they hold; ``file`` is an index of ``files``.
    """

    place: Place
    files: tuple[FileRecord, ...]
    identities: tuple[Identity, ...]
    chunks: Mapping[Content, ChunkRecord]

    @classmethod
    def of(
        cls,
        place: Place,
        files: Iterable[FileRecord],
        identities: Iterable[Identity],
        chunks: Iterable[ChunkRecord],
    ) -> Base:
        """Return it for the records of a checkpoint."""
        by_content = {(each.raw_xxh3_128, each.raw_length): each for each in chunks}
        return cls(place, tuple(files), tuple(identities), by_content)

    def is_there(self) -> list[bool]:
        """Return for each file whether it is the one that was written."""
        found = []
        for file, identity in zip(self.files, self.identities, strict=True):
            try:
                found.append((self.place / file.name).identity() == identity)
            except LoadError:
                found.append(False)
        return found


@dataclass(slots=True)
class Last:
    """What was saved last, for the next save; set by the event loop, read while no save runs.

    Attributes:
        base: what can be taken from it; None: that is not known.
        plan, versions, chunks: what its chunks were made of, where that is noted, and their records
            by index, ``file`` being one of ``base.files``.
    """

    base: Base | None = None
    plan: Plan | None = None
    versions: Versions | None = None
    chunks: Mapping[int, ChunkRecord] = field(default_factory=dict)

    def forget(self) -> None:
        """Take nothing from it."""
        self.base, self.plan, self.versions, self.chunks = None, None, None, {}


NO_BASE = Base(Place(Path()), (), (), {})
"""Nothing to take from."""

Earlier = Callable[[], Base | None]
"""Reads what there is to take from, where no save of this process has left it."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What one save takes from an earlier checkpoint. Any thread may call.

    Attributes:
        base: that checkpoint.
        linked: which of its files have a name in the new one, and the number in that.
    """

    base: Base = NO_BASE
    linked: Mapping[int, int] = field(default_factory=dict)

    def find(self, raw_digest: str, nbytes: int) -> ChunkRecord | None:
        """Return the record of a chunk that holds the same, if there is one."""
        found = self.base.chunks.get((raw_digest, nbytes))
        return found if found is not None and found.file in self.linked else None

    def kept(self, needed: Mapping[int, Collection[ChunkRecord]]) -> set[int]:
        """Return which files are worth keeping, of those of which chunks are needed."""
        nbytes = {number: frames_bytes(records) for number, records in needed.items()}
        worth = [
            number
            for number, length in nbytes.items()
            if length >= _LEAST_NEEDED * self.base.files[number].length
        ]
        return set(sorted(worth, key=lambda number: -nbytes[number])[:_MOST_KEPT])


def frames_bytes(records: Iterable[ChunkRecord]) -> int:
    """Return how many bytes the frames of chunks take in their file."""
    return sum(padded(record.length) for record in records)


def by_file(records: Iterable[ChunkRecord]) -> dict[int, list[ChunkRecord]]:
    """Return records by the number of the file that they are in."""
    found: dict[int, list[ChunkRecord]] = {}
    for record in records:
        found.setdefault(record.file, []).append(record)
    return found


def are_sound(file: File, records: Sequence[ChunkRecord], scratch: Bytes) -> bool:
    """Whether the frames of chunks are what was written."""
    try:
        for record in records:
            read_frame(file, record, scratch)
    except SaveError:
        return False
    return True


def read_frame(file: File, record: ChunkRecord, into: Bytes) -> None:
    """Read a frame, and compare it with its digest.

    Raises:
        SaveError: it is not what was written.
    """
    view = into[: record.length]
    try:
        count = file.read_into(record.offset, view.data)
    except LoadError as cause:
        raise SaveError(f"cannot copy what has not changed from {file.path}: {cause}") from cause
    if count != record.length or digest(view.data) != record.xxh3_128:
        raise SaveError(f"{file.path} is damaged: what has not changed cannot be copied from it")
