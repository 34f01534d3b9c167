"""Checkpoint: one that is open, and bytes from it into memory, in parallel.

`Checkpoint.open` believes nothing: names are fixed by the format, records are validated before they
are used, links and pipes are refused. `Checkpoint.read` fills memory. `Checkpoint.check` is how a
live state is filled only once all bytes were found sound, and what they decode to. It keeps stored
bytes that came from the disk, as many as it may; `read` takes those from there, and reads and
checks the others once more, from the page cache most often. What they decode to is not kept:
measured on a virtual machine, new memory for 16 MiB takes 11 ms, and to read and decode them 7.

Who calls what: the caller's thread opens and waits; threads that live only as long as one call
read.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence

from ..format.checked import Manifest, decode_checkpoint, decode_rank
from ..format.files import CHECKPOINT_FILE, MAX_RANK_BYTES
from ..format.records import CheckpointRecord
from ..pages import Bytes, pages
from ..storage.files import File
from ..storage.place import Place
from ..storage.steps import check_name
from .chunks import Chunks
from .files import check_entry, check_length, read_first, read_whole
from .fill import Fill, scatter, tiles
from .workers import Scratch, in_parallel

ChunkId = tuple[int, int]
"""The rank that has a chunk, and the chunk's number there."""


_PIECE_BYTES = 256 << 10
"""On average, a chunk that is read into several pieces of memory fills so much of each, or more."""


class Checkpoint:
    """An open checkpoint. Use as a context manager, or `close` it.

    Attributes:
        path: its directory.
        record: ``checkpoint.json``, validated.
        tree: the saved state, validated.
        leaves: its values with bulk, by the numbers that TensorNodes have.
        chunks: those of each rank.
        stored_bytes: length of all its files.
    """

    def __init__(
        self,
        place: Place,
        record: CheckpointRecord,
        manifests: Sequence[Manifest],
        chunks: Sequence[Chunks],
        stored_bytes: int,
        opened: contextlib.ExitStack,
    ) -> None:
        self.path = place.path
        self.record = record
        # how the trees of several ranks belong together is not defined yet: one is let through
        self.tree = manifests[0].tree
        self.leaves = manifests[0].leaves
        self.chunks = chunks
        self.stored_bytes = stored_bytes
        self._place = place
        self._opened = opened

    @classmethod
    def open(cls, place: Place) -> Checkpoint:
        """Open the checkpoint at ``place``.

        Raises:
            CheckpointNotFoundError: there is none.
            FormatError, UnsupportedVersionError, IntegrityError: there is one, but it is not sound.
        """
        first = read_first(place)
        record = decode_checkpoint(first, place.path / CHECKPOINT_FILE)
        check_name(place, record.step)
        manifests: list[Manifest] = []
        chunks: list[Chunks] = []
        nbytes = len(first)
        with contextlib.ExitStack() as opened:
            for rank, entry in enumerate(record.ranks):
                name = place / entry.file
                data = read_whole(name, MAX_RANK_BYTES, exactly=entry.length)
                manifest = decode_rank(data, entry, rank, name.path)
                files: list[File] = []
                for file in manifest.files:
                    files.append((place / file.name).open())
                    opened.callback(files[-1].close)
                    check_length(files[-1], file.length)
                manifests.append(manifest)
                chunks.append(Chunks(manifest, files))
                nbytes += len(data) + sum(file.nbytes for file in files)
            nbytes += sum(sidecar.length for sidecar in record.files)
            return cls(place, record, manifests, chunks, nbytes, opened.pop_all())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        self._opened.close()

    @property
    def chunk_count(self) -> int:
        """How many chunks it has."""
        return sum(len(rank.records) for rank in self.chunks)

    @property
    def raw_bytes(self) -> int:
        """Length of all its chunks, decoded."""
        return sum(rank.addresses[-1] for rank in self.chunks)

    def read(self, fills: Sequence[Fill], kept: dict[ChunkId, Bytes] | None = None) -> None:
        """Fill all of ``fills``; chunks that none needs are not read.

        Args:
            kept: what `check` returned; given back to the system bit by bit.

        Raises:
            IntegrityError: bytes are not what was written. Fills may be partly done then.
            LoadError: they cannot be read now.
        """
        kept = kept or {}
        needed = self._needed(fills)

        def read(chunk: ChunkId, scratch: Scratch) -> None:
            self._fill(chunk, needed[chunk], scratch, kept.pop(chunk, None))

        in_parallel(needed, read, self._longest)

    def check(
        self, fill: Sequence[Fill] = (), keep: Sequence[Fill] = (), keep_bytes: int = 0
    ) -> dict[ChunkId, Bytes]:
        """Read every chunk, compare it with its checksum, decode it, and compare that.

        Args:
            fill: what to fill by the way.
            keep: what is to be filled by `read` afterwards.
            keep_bytes: how much memory may be used to spare `read` a second reading.

        Returns:
            Chunks for `read`.

        Raises:
            IntegrityError: the first difference, in the order of the file. What is in ``fill`` may
                be partly done then.
            LoadError: a chunk cannot be read now.
        """
        needed = self._needed(fill)
        kept = self._memory_to_keep(self._needed(keep), keep_bytes)

        def check(chunk: ChunkId, scratch: Scratch) -> None:
            stored = kept.get(chunk)
            if stored is not None:
                rank, i = chunk
                self.chunks[rank].read_stored(i, stored)
            self._fill(chunk, needed.get(chunk, ()), scratch, stored)

        every = [(r, i) for r, rank in enumerate(self.chunks) for i in range(len(rank.records))]
        in_parallel(every, check, self._longest)
        return kept

    def check_files(self) -> None:
        """Compare the files beside the state with their checksums.

        Raises:
            IntegrityError: one is missing, or is not what was written; values are unharmed.
            LoadError: it cannot be read now.
        """
        for each in self.record.files:
            check_entry(self._place / each.file, each)

    def check_gaps(self) -> None:
        """Check the bytes without a checksum, those between frames.

        Raises:
            IntegrityError: they are not zeros; values are unharmed, so only `verify` asks.
        """
        for rank in self.chunks:
            rank.check_gaps()

    @property
    def _longest(self) -> int:
        lengths = (chunk.raw_length for rank in self.chunks for chunk in rank.records)
        return max(lengths, default=0)

    def _needed(self, fills: Sequence[Fill]) -> dict[ChunkId, list[Fill]]:
        """Return which fills each chunk has bytes for, in address order."""
        needed: dict[ChunkId, list[Fill]] = {}
        for fill in sorted(fills, key=operator.attrgetter("rank", "start")):
            for i in self.chunks[fill.rank].of(fill.start, fill.stop):
                needed.setdefault((fill.rank, i), []).append(fill)
        return needed

    def _memory_to_keep(self, chunks: Iterable[ChunkId], limit_bytes: int) -> dict[ChunkId, Bytes]:
        """Return memory for the stored bytes of the first chunks, as many as fit.

        What is in the page cache is as well there: to take memory from the system costs more than
        to read it twice.
        """
        kept: dict[ChunkId, Bytes] = {}
        for rank, i in sorted(chunks):
            if self.chunks[rank].is_cached(i):
                continue
            nbytes = self.chunks[rank].records[i].length
            limit_bytes -= nbytes
            if limit_bytes < 0:
                break
            try:
                kept[rank, i] = pages(nbytes, huge=True)  # O_DIRECT reads into it
            except OSError:  # no room after all: everything can be read twice
                break
        return kept

    def _fill(
        self, chunk: ChunkId, fills: Sequence[Fill], scratch: Scratch, stored: Bytes | None
    ) -> None:
        """Read a chunk, straight into what it fills if that is possible, and not too little each.

        What is decoded goes into one piece of memory alone, what is stored as it is into several.
        """
        rank, i = chunk
        chunks = self.chunks[rank]
        low, high = chunks.addresses[i : i + 2]
        few = 1
        if stored is None and chunks.is_plain(i):
            few = max(few, (high - low) // _PIECE_BYTES)
        pieces = tiles(fills, low, high) if len(fills) <= few else []
        if not pieces:
            scatter(chunks.read(i, None, scratch, stored), low, fills)
            return
        if len(pieces) == 1:
            chunks.read(i, pieces[0], scratch, stored)
        else:
            chunks.read_stored(i, *pieces)
        for fill, piece in zip(fills, pieces, strict=True):
            fill.filled(piece.size)
