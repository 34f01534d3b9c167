"""Checkpoint: checked bytes from a checkpoint into memory, in parallel.

`Checkpoint.open` believes nothing: names are fixed by the format, records are validated before they
are used, links and pipes are refused. `Checkpoint.read` reads each chunk that is needed once,
compares its checksum before decoding and another after, and decodes straight into the destination
wherever a chunk lies in one piece of it. `Checkpoint.check` is how a live state is filled only once
all bytes were found sound: it holds chunks in memory, as many as it may; `read` then copies those
from there, and reads and checks the others once more.

Who calls what: the caller's thread opens and waits; threads that live only as long as one call
read.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..codec.frame import Decoder
from ..errors import CheckpointNotFoundError, FormatError, IntegrityError, LoadError
from ..format.manifest import (
    CHECKPOINT_FILE,
    MAX_CHECKPOINT_BYTES,
    MAX_RANK_BYTES,
    CheckpointRecord,
    ChunkRecord,
    RankRecord,
    decode_checkpoint,
    decode_rank,
    digest,
)
from ..pages import Bytes, pages
from ..storage.filesystem import FileSystem, ReadableFile
from ..storage.steps import check_name

_SCRATCH_BYTES = 512 << 20
"""What reading threads take in all, except that one may take three times the longest chunk."""


class Run:
    """A run of the address space, and the memory it is to fill.

    Args:
        start: its first address.
        nbytes: its length.
        memory: a uint8 array of that length; or a function that makes one, called when it is
            needed.
        finish: called with the array once it is full, in the thread that filled it.
    """

    def __init__(
        self,
        start: int,
        nbytes: int,
        memory: Bytes | Callable[[], Bytes],
        finish: Callable[[], None] | None = None,
    ) -> None:
        self.start = start
        self.stop = start + nbytes
        self._memory = memory
        self._finish = finish
        self._missing = nbytes
        self._lock = threading.Lock()

    def part(self, start: int, stop: int) -> Bytes:
        """Return the memory for the addresses ``start`` to ``stop``."""
        with self._lock:
            if callable(self._memory):
                self._memory = self._memory()
            return self._memory[start - self.start : stop - self.start]

    def filled(self, nbytes: int) -> None:
        """Note that so many bytes more are there."""
        with self._lock:
            self._missing -= nbytes
            complete = self._missing == 0
        if complete:
            if self._finish is not None:
                self._finish()
            self._memory = _NOTHING  # what was only on the way is not needed any more


_NOTHING: Bytes = np.empty(0, np.uint8)


class Checkpoint:
    """An open checkpoint. Use as a context manager, or `close` it.

    Attributes:
        path: its directory.
        record: ``checkpoint.json``, validated.
        rank: ``rank-00000.json``, validated.
        stored_bytes: length of all its files.
    """

    def __init__(
        self,
        path: Path,
        record: CheckpointRecord,
        rank: RankRecord,
        files: list[ReadableFile],
        manifest_bytes: int,
    ) -> None:
        self.path = path
        self.record = record
        self.rank = rank
        self.stored_bytes = manifest_bytes + sum(file.nbytes for file in files)
        self._files = files
        self._addresses = list(
            itertools.accumulate((chunk.raw_length for chunk in rank.chunks), initial=0)
        )
        self._longest = max((chunk.raw_length for chunk in rank.chunks), default=0)

    @classmethod
    def open(cls, filesystem: FileSystem, path: Path) -> Checkpoint:
        """Open the checkpoint at ``path``.

        Raises:
            CheckpointNotFoundError: there is none.
            FormatError, UnsupportedVersionError, IntegrityError: there is one, but it is not sound.
        """
        first = _read_first(filesystem, path)
        record = decode_checkpoint(first, path / CHECKPOINT_FILE)
        check_name(path, record.step)
        entry = record.ranks[0]
        second = path / entry.file
        data = _read_all(filesystem, second, MAX_RANK_BYTES, exactly=entry.length)
        rank = decode_rank(data, entry, second)
        files: list[ReadableFile] = []
        try:
            for file in rank.files:
                opened = _open(filesystem, path / file.name)
                files.append(opened)
                if opened.nbytes != file.length:
                    raise IntegrityError(
                        f"{path / file.name} is {opened.nbytes} bytes long, not {file.length}",
                        path=path / file.name,
                        offset=min(opened.nbytes, file.length),
                    )
        except BaseException:
            for opened in files:
                opened.close()
            raise
        return cls(path, record, rank, files, len(first) + len(data))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        for file in self._files:
            file.close()

    def read(self, runs: Sequence[Run], held: dict[int, Bytes] | None = None) -> None:
        """Fill all runs; chunks that no run needs are not read.

        Args:
            held: what `check` returned; given back to the system bit by bit.

        Raises:
            IntegrityError: bytes are not what was written. Runs may be partly filled then.
        """
        held = held or {}
        wanted = self._wanted(runs)

        def one(i: int, worker: _Worker) -> None:
            if i in held:
                self._give(i, held.pop(i), wanted[i])
            else:
                self._read_chunk(i, wanted[i], worker)

        self._each(wanted, one)

    def check(
        self, fill: Sequence[Run] = (), hold: Sequence[Run] = (), hold_bytes: int = 0
    ) -> dict[int, Bytes]:
        """Read every chunk, compare it with its checksum, decode it, and compare that.

        Args:
            fill: runs to fill by the way.
            hold: runs that are to be filled by `read` afterwards.
            hold_bytes: how much memory may be used to spare `read` a second reading.

        Returns:
            Chunks, by number, for `read`.

        Raises:
            IntegrityError: the first difference, in the order of the file. Runs of ``fill`` may be
                partly filled then.
        """
        wanted = self._wanted(fill)
        held = self._room(self._wanted(hold), hold_bytes)

        def one(i: int, worker: _Worker) -> None:
            memory = held.get(i)
            if memory is None and i in wanted:
                self._read_chunk(i, wanted[i], worker)
                return
            raw = self._raw(i, memory, worker)
            self._give(i, raw, wanted.get(i, ()))

        self._each(range(len(self.rank.chunks)), one)
        return held

    def _wanted(self, runs: Sequence[Run]) -> dict[int, list[Run]]:
        """Return which runs each chunk has bytes for."""
        wanted: dict[int, list[Run]] = {}
        for run in sorted(runs, key=lambda run: run.start):
            if run.start == run.stop:
                continue
            first = bisect.bisect_right(self._addresses, run.start) - 1
            for i in range(first, len(self.rank.chunks)):
                if self._addresses[i] >= run.stop:
                    break
                wanted.setdefault(i, []).append(run)
        return wanted

    def _room(self, chunks: Iterable[int], limit_bytes: int) -> dict[int, Bytes]:
        """Return memory for the first chunks, as many as fit, that are dear to read twice.

        The page cache holds a chunk that need not be decoded just as well. (Measured, warm: 5 GB/s
        to read it twice, 1.8 to hold it: most of that is taking the memory from the system.)
        """
        room: dict[int, Bytes] = {}
        for i in sorted(chunks):
            chunk = self.rank.chunks[i]
            raw = chunk.coding == "raw"
            if raw and self._files[chunk.file].is_cached(chunk.offset, chunk.length):
                continue
            limit_bytes -= chunk.raw_length
            if limit_bytes < 0:
                break
            try:
                # huge where O_DIRECT reads into it
                room[i] = pages(chunk.raw_length, huge=raw)
            except OSError:  # no room after all: everything can be read twice
                break
        return room

    def _each(self, chunks: Any, job: Callable[[int, _Worker], None]) -> None:
        """Run ``job`` for each chunk in a few threads; the first error in order is raised."""
        indices = list(chunks)
        if not indices:
            return
        local = threading.local()
        stop = threading.Event()

        def run(i: int) -> None:
            if stop.is_set():
                return
            if not hasattr(local, "worker"):
                local.worker = _Worker(self._longest)
            try:
                job(i, local.worker)
            except BaseException:
                stop.set()
                raise

        # each thread has room for a frame, its planes and the chunk
        threads = min(reader_threads(), len(indices), _SCRATCH_BYTES // (3 * self._longest))
        threads = max(1, threads)
        with ThreadPoolExecutor(threads, thread_name_prefix="asyncsave-read") as pool:
            futures = [pool.submit(run, i) for i in indices]
        for future in futures:
            future.result()

    def _read_chunk(self, i: int, runs: Sequence[Run], worker: _Worker) -> None:
        low, high = self._addresses[i], self._addresses[i + 1]
        run = runs[0]
        if len(runs) == 1 and run.start <= low and high <= run.stop:
            self._raw(i, run.part(low, high), worker)
            run.filled(high - low)
        else:
            self._give(i, self._raw(i, None, worker), runs)

    def _give(self, i: int, raw: Bytes, runs: Sequence[Run]) -> None:
        """Copy what runs need of a chunk."""
        low, high = self._addresses[i], self._addresses[i + 1]
        for run in runs:
            start, stop = max(low, run.start), min(high, run.stop)
            np.copyto(run.part(start, stop), raw[start - low : stop - low])
            run.filled(stop - start)

    def _raw(self, i: int, memory: Bytes | None, worker: _Worker) -> Bytes:
        """Read, check and decode a chunk into ``memory``, or else into the worker's."""
        chunk = self.rank.chunks[i]
        stored = worker.stored[: chunk.length]
        if chunk.coding == "raw":
            stored = raw = stored if memory is None else memory
        else:
            raw = worker.raw[: chunk.raw_length] if memory is None else memory
        self._decode(i, self._frame(i, stored), raw, worker)
        return raw

    def _frame(self, i: int, memory: Bytes) -> Bytes:
        """Read a chunk's stored bytes and check them."""
        chunk = self.rank.chunks[i]
        file = self._files[chunk.file]
        try:
            count = file.read_into(chunk.offset, memory.data)
        except OSError as cause:
            if cause.errno in _PASSING:
                raise LoadError(f"{self.path} cannot be read now: {cause}") from cause
            raise self._damage(chunk, f"cannot be read: {cause}") from cause
        if count != chunk.length or digest(memory.data) != chunk.xxh3_128:
            raise self._damage(chunk, "does not have the checksum it was written with")
        return memory

    def _decode(self, i: int, frame: Bytes, out: Bytes, worker: _Worker) -> None:
        chunk = self.rank.chunks[i]
        if chunk.coding == "raw":
            if chunk.raw_xxh3_128 != chunk.xxh3_128:
                raise self._damage(chunk, "has two checksums that contradict each other")
            return
        try:
            worker.decoder.decode(frame, chunk.coding, chunk.parts, out)
        except ValueError as cause:
            raise self._damage(chunk, f"cannot be decoded: {cause}") from cause
        if digest(out.data) != chunk.raw_xxh3_128:
            raise self._damage(chunk, "decodes to bytes that do not have the checksum they should")

    def check_padding(self) -> None:
        """Check that what lies between frames is zeros, the only bytes without a checksum.

        Raises:
            IntegrityError: it is not; values are unharmed, so only `verify` asks.
        """
        for number, file in enumerate(self._files):
            end = 0
            chunks = [chunk for chunk in self.rank.chunks if chunk.file == number]
            for offset, length in [
                *((chunk.offset, chunk.length) for chunk in sorted(chunks, key=lambda c: c.offset)),
                (file.nbytes, 0),
            ]:
                # a hole may be far longer than anybody wants to read
                while (end := file.skip_hole(end)) < offset:
                    nbytes = min(offset - end, 1 << 20)
                    self._check_zeros(number, end, nbytes)
                    end += nbytes
                end = offset + length

    def _check_zeros(self, file: int, offset: int, nbytes: int) -> None:
        name = self.path / self.rank.files[file].name
        gap = np.empty(nbytes, np.uint8)
        try:
            count = self._files[file].read_into(offset, gap.data)
        except OSError as cause:
            what = f"{name} cannot be read at offset {offset}: {cause}"
            raise IntegrityError(what, path=name, offset=offset) from cause
        if count != nbytes or gap.any():
            what = f"{name} has bytes that are not zero between its frames"
            raise IntegrityError(what, path=name, offset=offset)

    def _damage(self, chunk: ChunkRecord, what: str) -> IntegrityError:
        path = self.path / self.rank.files[chunk.file].name
        return IntegrityError(
            f"{path} is damaged: the chunk of {chunk.length} bytes at offset {chunk.offset} {what}",
            path=path,
            offset=chunk.offset,
        )


class _Worker:
    """The scratch memory of one reading thread."""

    def __init__(self, longest: int) -> None:
        try:
            # untouched memory costs nothing: what a checkpoint does not need is never used
            self.stored = pages(longest, huge=True)
            self.raw = pages(longest, huge=True)
            self.decoder = Decoder(longest)
        except (MemoryError, OSError) as cause:
            raise LoadError(f"there is no memory to read a chunk of {longest} bytes") from cause


def reader_threads() -> int:
    """Return how many threads read: one more than the cores, eight at most.

    So the disk has something to do while chunks are checked, decoded and copied.
    """
    return min(8, len(os.sched_getaffinity(0)) + 1)


_PASSING = {
    *(errno.ENOMEM, errno.EINTR),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
}
_SAYS_NOTHING = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, *_PASSING}
"""Refusals that are no damage: to go on from an older checkpoint would lose work."""


def _open(filesystem: FileSystem, path: Path) -> ReadableFile:
    try:
        return filesystem.open(path)
    except FileNotFoundError as cause:
        raise IntegrityError(f"{path} is missing", path=path, offset=0) from cause
    except OSError as cause:
        if cause.errno in _SAYS_NOTHING:
            raise LoadError(f"{path} cannot be opened: {cause.strerror}") from cause
        raise IntegrityError(f"{path} cannot be opened: {cause}", path=path, offset=0) from cause


def read_record(filesystem: FileSystem, path: Path) -> CheckpointRecord:
    """Return the ``checkpoint.json`` of the checkpoint at ``path``, validated.

    Raises:
        CheckpointNotFoundError, FormatError, UnsupportedVersionError, IntegrityError.
    """
    return decode_checkpoint(_read_first(filesystem, path), path / CHECKPOINT_FILE)


def _read_first(filesystem: FileSystem, path: Path) -> bytes | bytearray:
    file = path / CHECKPOINT_FILE
    if not filesystem.exists(file):
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {path}: it has no {CHECKPOINT_FILE}"
        )
    return _read_all(filesystem, file, MAX_CHECKPOINT_BYTES)


def _read_all(
    filesystem: FileSystem, path: Path, limit: int, exactly: int | None = None
) -> bytes | bytearray:
    file = _open(filesystem, path)
    try:
        if exactly is not None and file.nbytes != exactly:
            raise IntegrityError(
                f"{path} is {file.nbytes} bytes long, not {exactly}",
                path=path,
                offset=min(file.nbytes, exactly),
            )
        if file.nbytes > limit:
            raise FormatError(f"{path} is {file.nbytes} bytes long; at most {limit} are allowed")
        buffer = bytearray(file.nbytes)
        count = file.read_into(0, memoryview(buffer))
    except MemoryError as cause:
        raise LoadError(f"there is no memory for the {file.nbytes} bytes of {path}") from cause
    except OSError as cause:
        if cause.errno in _PASSING:
            raise LoadError(f"{path} cannot be read now: {cause}") from cause
        raise IntegrityError(f"{path} cannot be read: {cause}", path=path, offset=0) from cause
    finally:
        file.close()
    del buffer[count:]
    return buffer
