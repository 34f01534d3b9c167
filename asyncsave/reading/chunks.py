"""Chunks: those of one rank: which addresses each has, and its bytes, checked and decoded.

A chunk's checksum is compared before it is decoded, and another one after, and it is decoded
straight into the memory that it is for, if that is one piece.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from ..errors import IntegrityError
from ..format.checked import Manifest
from ..format.records import ChunkRecord, digest
from ..pages import Bytes
from ..storage.files import File
from .workers import Scratch


class Chunks:
    """The chunks of one rank, by number, and the open files that they are in.

    Args:
        manifest: the rank's.
        files: its data files, open; they stay the caller's.

    Attributes:
        manifest: what was given.
        records: the chunks' own.
        addresses: where each begins, and behind the last one, where that ends.
    """

    def __init__(self, manifest: Manifest, files: Sequence[File]) -> None:
        self.records = manifest.chunks
        lengths = (chunk.raw_length for chunk in manifest.chunks)
        self.addresses = list(itertools.accumulate(lengths, initial=0))
        self._files = files
        self.manifest = manifest

    def of(self, start: int, stop: int) -> range:
        """Return the numbers of the chunks that have the addresses ``start`` to ``stop``."""
        if start == stop:
            return range(0)
        first = bisect.bisect_right(self.addresses, start) - 1
        return range(first, bisect.bisect_left(self.addresses, stop, first))

    def is_plain(self, i: int) -> bool:
        """Whether a chunk is stored as it is."""
        return self.records[i].coding == "raw"

    def is_cached(self, i: int) -> bool:
        """Whether a chunk is in the page cache."""
        chunk = self.records[i]
        return self._files[chunk.file].is_cached(chunk.offset, chunk.length)

    def read(
        self, i: int, memory: Bytes | None, scratch: Scratch, stored: Bytes | None = None
    ) -> Bytes:
        """Return a chunk's bytes, decoded, in ``memory``, or else wherever they are.

        Args:
            stored: where `read_stored` has put it, if that was called before.

        Raises:
            IntegrityError: they are not what was written.
            LoadError: they cannot be read now.
        """
        chunk = self.records[i]
        if chunk.coding == "raw":
            if stored is None:
                raw = scratch.stored[: chunk.length] if memory is None else memory
                self.read_stored(i, raw)
                return raw
            if memory is None:
                return stored
            np.copyto(memory, stored)
            return memory
        if stored is None:
            stored = scratch.stored[: chunk.length]
            self.read_stored(i, stored)
        raw = scratch.raw[: chunk.raw_length] if memory is None else memory
        try:
            scratch.decoder.decode(stored, chunk.coding, chunk.parts, raw)
        except ValueError as cause:
            raise self._damage(chunk, f"cannot be decoded: {cause}") from cause
        if digest(raw.data) != chunk.raw_xxh3_128:
            raise self._damage(chunk, "decodes to bytes that do not have the checksum they should")
        return raw

    def check_gaps(self) -> None:
        """Check that what lies between frames is zeros, the only bytes without a checksum.

        Raises:
            IntegrityError: it is not; values are unharmed, so only `verify` asks.
        """
        frames: list[set[tuple[int, int]]] = [set() for _ in self._files]
        for chunk in self.records:
            frames[chunk.file].add((chunk.offset, chunk.length))
        for number, file in enumerate(self._files):
            if self.manifest.files[number].linked:
                continue  # other checkpoints have frames there
            end = 0
            for offset, length in [*sorted(frames[number]), (file.nbytes, 0)]:
                # a hole may be far longer than anybody wants to read
                while (end := file.skip_hole(end)) < offset:
                    nbytes = min(offset - end, 1 << 20)
                    _check_zeros(file, end, nbytes)
                    end += nbytes
                end = offset + length

    def read_stored(self, i: int, *pieces: Bytes) -> None:
        """Read a chunk's stored bytes into pieces of memory, end to end, and check them.

        Raises:
            IntegrityError, LoadError: see `read`.
        """
        chunk = self.records[i]
        file, at = self._files[chunk.file], chunk.offset
        for piece in pieces:
            at += file.read_into(at, piece.data)
        found = digest(*(piece.data for piece in pieces))
        if at != chunk.offset + chunk.length or found != chunk.xxh3_128:
            raise self._damage(chunk, "does not have the checksum it was written with")
        if chunk.coding == "raw" and chunk.raw_xxh3_128 != chunk.xxh3_128:
            raise self._damage(chunk, "has two checksums that contradict each other")

    def _damage(self, chunk: ChunkRecord, what: str) -> IntegrityError:
        path = self._files[chunk.file].path
        return IntegrityError(
            f"{path} is damaged: the chunk of {chunk.length} bytes at offset {chunk.offset} {what}",
            path=path,
            offset=chunk.offset,
        )


def _check_zeros(file: File, offset: int, nbytes: int) -> None:
    gap = np.empty(nbytes, np.uint8)
    if file.read_into(offset, gap.data) != nbytes or gap.any():
        what = f"{file.path} has bytes that are not zero between its frames"
        raise IntegrityError(what, path=file.path, offset=offset)
