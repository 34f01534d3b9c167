"""Reuse: chunks whose bytes an earlier checkpoint has are not encoded and not written again.

What a chunk holds is told by its digest and its length, so that no change of it can be missed. Its
frame stays where it is, and its file gets a second name (a hard link) in the new checkpoint, which
so is whole by itself: what becomes of the earlier one, or when, does not matter to it. Nothing
counts references but the filesystem.

A linked file holds room for as long as any checkpoint has it, also for frames that nobody needs any
more. So one of which less than half is needed is not linked: what is needed of it is copied, frame
by frame, into the new checkpoint's own file. So the files of a checkpoint are never longer than
twice what it needs of them, and its own. Where the filesystem gives no second name, all is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoadError, SaveError
from ..format.records import ChunkRecord, FileRecord, digest
from ..pages import Bytes, padded
from ..state.changes import Versions
from ..state.chunks import Plan
from ..storage.files import File
from ..storage.place import Place

_log = logging.getLogger("asyncsave")

LEAST_NEEDED = 0.5
"""A file is linked if so much of it is needed, or more."""

MOST_LINKED = 64
"""Files at most: whoever reads the checkpoint opens them all."""

Content = tuple[str, int]
"""A chunk's digest, decoded, and its length."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a checkpoint has that the next one may take from it.

    Attributes:
        place: its directory.
        files: its data files.
        chunks: its chunks, by what they hold; ``file`` is an index of ``files``.
    """

    place: Place
    files: tuple[FileRecord, ...]
    chunks: Mapping[Content, ChunkRecord]

    @classmethod
    def of(cls, place: Place, files: Iterable[FileRecord], chunks: Iterable[ChunkRecord]) -> Base:
        """Return it for the records of a checkpoint."""
        by_content = {(each.raw_xxh3_128, each.raw_length): each for each in chunks}
        return cls(place, tuple(files), by_content)


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


NO_BASE = Base(Place(Path()), (), {})
"""Nothing to take from."""

Earlier = Callable[[], Base | None]
"""Reads what there is to take from, where no save of this process has left it."""


class Reuse:
    """What one save takes from an earlier checkpoint, whose files it holds open meanwhile.

    `find` is called by encoders, all else by one thread at a time: the event loop's, or an io
    thread that it waits for.
    """

    def __init__(self, base: Base | None) -> None:
        self._files: dict[int, File] = {}
        self.base = base
        if base is None:
            return
        try:
            for i, record in enumerate(base.files):
                file = (base.place / record.name).open()
                if file.nbytes == record.length:
                    self._files[i] = file
                else:
                    file.close()
        except LoadError as error:  # it may have been removed: then there is nothing to take
            _log.debug("nothing is taken from %s: %s", base.place, error)

    def __del__(self) -> None:
        self.close()  # of a save that was interrupted before it was begun

    def close(self) -> None:
        """Close the files. Idempotent."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def find(self, raw_digest: str, nbytes: int) -> ChunkRecord | None:
        """Return the record of a chunk that holds the same, if there is one."""
        if self.base is None:
            return None
        found = self.base.chunks.get((raw_digest, nbytes))
        return found if found is not None and found.file in self._files else None

    def has(self, record: ChunkRecord) -> bool:
        """Whether the file is there that a chunk of the base is in."""
        return record.file in self._files

    def file(self, number: int) -> tuple[Place, int]:
        """Return where a file is, and its length."""
        assert self.base is not None
        record = self.base.files[number]
        return self.base.place / record.name, record.length

    def is_worth_linking(self, number: int, needed: Iterable[ChunkRecord]) -> bool:
        """Whether so much of a file is needed that it is linked, not copied."""
        frames = {record.offset: padded(record.length) for record in needed}
        return sum(frames.values()) >= LEAST_NEEDED * self._files[number].nbytes

    def read(self, record: ChunkRecord, into: Bytes) -> None:
        """Read a frame, to be copied, and compare it with its digest.

        Raises:
            SaveError: it is not what was written.
        """
        view = into[: record.length]
        file = self._files[record.file]
        try:
            count = file.read_into(record.offset, view.data)
        except LoadError as cause:
            raise SaveError(
                f"cannot copy what has not changed from {file.path}: {cause}"
            ) from cause
        if count != record.length or digest(view.data) != record.xxh3_128:
            raise SaveError(
                f"{file.path} is damaged: what has not changed since cannot be copied from there; "
                "the next save writes everything"
            )
