"""Reader: checked bytes from a checkpoint into memory, in parallel.

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
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..codec.frame import Decoder
from ..errors import CheckpointNotFoundError, FormatError, IntegrityError, LoadError
from ..snapshot.arena import Bytes, pages
from .filesystem import FileSystem, ReadableFile
from .manifest import (
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

STEP = re.compile(r"step-([0-9]{9,18})")
"""The names of checkpoints in a run directory."""


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
    """

    def __init__(
        self, path: Path, record: CheckpointRecord, rank: RankRecord, files: list[ReadableFile]
    ) -> None:
        self.path = path
        self.record = record
        self.rank = rank
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
        record = read_record(filesystem, path)
        entry = record.ranks[0]
        second = path / entry.file
        rank = decode_rank(_read_all(filesystem, second, MAX_RANK_BYTES), entry, second)
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
        return cls(path, record, rank, files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        for file in self._files:
            file.close()

    @property
    def stored_bytes(self) -> int:
        """Length of all its files."""
        manifests = self.path / CHECKPOINT_FILE, self.path / self.record.ranks[0].file
        return sum(path.stat().st_size for path in manifests) + sum(
            file.nbytes for file in self._files
        )

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
                # huge where O_DIRECT reads into it; they are not always to be had fast: measured,
                # 0.4 to 12 GB/s for their first touch, small ones 1.9 to 2.6
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

        threads = min(reader_threads(), len(indices))
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
                while end < offset:
                    gap = np.empty(min(offset - end, 1 << 20), np.uint8)
                    if file.read_into(end, gap.data) != gap.size or gap.any():
                        name = self.path / self.rank.files[number].name
                        raise IntegrityError(
                            f"{name} has bytes that are not zero between its frames",
                            path=name,
                            offset=end,
                        )
                    end += gap.size
                end = offset + length

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
        # untouched memory costs nothing: what a checkpoint does not need is never used
        self.stored = pages(longest)
        self.raw = pages(longest)
        self.decoder = Decoder(longest)


def reader_threads() -> int:
    """Return how many threads read: one more than the cores, eight at most.

    So the disk has something to do while chunks are checked, decoded and copied.
    """
    return min(8, len(os.sched_getaffinity(0)) + 1)


def _open(filesystem: FileSystem, path: Path) -> ReadableFile:
    try:
        return filesystem.open(path)
    except FileNotFoundError as cause:
        raise IntegrityError(f"{path} is missing", path=path, offset=0) from cause
    except PermissionError as cause:
        raise LoadError(f"{path} may not be read: {cause.strerror}") from cause
    except OSError as cause:
        raise IntegrityError(f"{path} cannot be opened: {cause}", path=path, offset=0) from cause


def read_record(filesystem: FileSystem, path: Path) -> CheckpointRecord:
    """Return the ``checkpoint.json`` of the checkpoint at ``path``, validated.

    Raises:
        CheckpointNotFoundError, FormatError, UnsupportedVersionError, IntegrityError.
    """
    file = path / CHECKPOINT_FILE
    if not filesystem.exists(file):
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {path}: it has no {CHECKPOINT_FILE}"
        )
    return decode_checkpoint(_read_all(filesystem, file, MAX_CHECKPOINT_BYTES), file)


def _read_all(filesystem: FileSystem, path: Path, limit: int) -> bytes:
    file = _open(filesystem, path)
    try:
        if file.nbytes > limit:
            raise FormatError(f"{path} is {file.nbytes} bytes long; at most {limit} are allowed")
        buffer = bytearray(file.nbytes)
        count = file.read_into(0, memoryview(buffer))
    except OSError as cause:
        raise IntegrityError(f"{path} cannot be read: {cause}", path=path, offset=0) from cause
    finally:
        file.close()
    return bytes(buffer[:count])


def step_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, or would be."""
    return directory / f"step-{step:09d}"


def list_steps(filesystem: FileSystem, directory: Path) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; [] where there is no directory."""
    try:
        names = filesystem.list_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = []
    for name in names:
        match = STEP.fullmatch(name)
        if not match or step_path(directory, int(match[1])).name != name:
            continue
        if filesystem.is_directory(directory / name):
            steps.append(int(match[1]))
    return sorted(steps)


def find(filesystem: FileSystem, path: Path) -> Iterator[Path]:
    """Yield the checkpoint at ``path``; or those of the run directory there, newest first.

    Raises:
        CheckpointNotFoundError: it is neither.
    """
    if filesystem.exists(path / CHECKPOINT_FILE):
        yield path
        return
    steps = list_steps(filesystem, path)
    if not steps:
        why = (
            "there is nothing there"
            if not filesystem.exists(path)
            else (f"it has no {CHECKPOINT_FILE} and no step-… directories")
        )
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}: {why}")
    for step in reversed(steps):
        yield step_path(path, step)
