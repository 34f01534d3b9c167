"""Workers: a few threads that live as long as one call, each with memory to decode chunks in."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from ..codec.frame import Decoder
from ..errors import LoadError
from ..pages import pages

_SCRATCH_BYTES = 512 << 20
"""What all threads take, except that one may take three times the longest chunk."""

_LITTLE_BYTES = 1 << 20
"""Of so little, starting threads takes longer than reading it: a load of 150 kB 2.8 ms, not 1.9."""

_NAME = "asyncsave-read"

_T = TypeVar("_T")


class Scratch:
    """The memory of one thread.

    Args:
        longest: length of the longest chunk, in bytes, stored or decoded.

    Attributes:
        stored: memory for a frame.
        raw: memory for a decoded chunk.
        decoder: makes the one of the other.

    Raises:
        LoadError: there is no memory.
    """

    def __init__(self, longest: int) -> None:
        try:
            # untouched memory costs nothing: what a checkpoint does not need is never used
            self.stored = pages(longest, huge=True)
            self.raw = pages(longest, huge=True)
            self.decoder = Decoder(longest)
        except (MemoryError, OSError) as cause:
            raise LoadError(f"there is no memory to read a chunk of {longest} bytes") from cause


def in_parallel(work: Iterable[_T], job: Callable[[_T, Scratch], None], longest: int) -> None:
    """Run ``job`` for each piece of work in a few threads; the first error in order is raised.

    Where one thread would do, or there is little to read, that is the caller's.

    Args:
        longest: see `Scratch`.
    """
    items = list(work)
    if not items:
        return
    # each thread has room for a frame, its planes and the chunk
    threads = min(reader_threads(), len(items), _SCRATCH_BYTES // (3 * longest))
    if threads <= 1 or longest * len(items) <= _LITTLE_BYTES:
        scratch = Scratch(longest)
        for item in items:
            job(item, scratch)
        return
    _Crew(items, job, longest).run(threads)


class _Crew(Generic[_T]):
    """What the threads of one call share.

    Attributes:
        stop: nothing is begun any more. Once this is set and a reader's turn is free, that reader
            has touched what it will touch: one that had not come that far finds it set.
    """

    def __init__(
        self, items: Sequence[_T], job: Callable[[_T, Scratch], None], longest: int
    ) -> None:
        self.stop = False
        self._items = enumerate(items)  # taking one is a single step, for any thread
        self._job = job
        self._longest = longest
        self._errors: list[tuple[int, BaseException]] = []

    def run(self, threads: int) -> None:
        """Let so many threads do the work; when this is left, however, they have let go of it."""
        turns = [threading.Lock() for _ in range(threads)]
        readers = [
            # a daemon: one whose start() is interrupted may hang in it, and would keep the program
            threading.Thread(target=self.work, args=(turn,), name=f"{_NAME}-{i}", daemon=True)
            for i, turn in enumerate(turns)
        ]
        try:
            started = 0
            for reader in readers:
                try:
                    reader.start()
                except RuntimeError as refused:
                    if "can't start" not in str(refused):  # an interrupt may end as one, too
                        raise
                    break  # the system has no more threads: fewer do it all
                started += 1
            if not started:
                self.work(turns[0])
            for reader in readers[:started]:
                reader.join()
        except BaseException:
            # An interrupt. Who called this is about to close the files, and the memory is that of
            # live weights: no reader may have a hand in them from here on. Not by join(): until
            # Python 3.13, one that is interrupted takes its thread for dead while that still runs
            # (bpo-46726). And nothing is called outside of the inner `try`, since interrupts come
            # where a function begins, or has returned.
            self.stop = True
            while True:
                try:
                    for turn in turns:
                        with turn:
                            pass
                    break
                except BaseException:  # interrupted again; the first one is raised
                    continue
            raise
        self._raise_first()

    def work(self, turn: threading.Lock) -> None:
        """Do one piece after the other, in a thread that has ``turn`` meanwhile."""
        with turn:
            scratch = None
            while not self.stop and (piece := next(self._items, None)) is not None:
                number, item = piece
                try:
                    scratch = scratch or Scratch(self._longest)
                    self._job(item, scratch)
                except BaseException as error:
                    self.stop = True
                    self._errors.append((number, error))

    def _raise_first(self) -> None:
        """Raise the first error in the order of the work, if there is one."""
        if not self._errors:
            return
        _, error = min(self._errors, key=operator.itemgetter(0))
        self._errors.clear()
        try:
            raise error
        finally:
            del error  # or it would hold its own traceback, and with it the memory of a thread


def reader_threads() -> int:
    """Return how many threads read: one more than the cores, eight at most.

    So the disk has something to do while chunks are checked, decoded and copied. Measured on 2
    cores with 1, 2, 3, 4 threads (bench/knobs.py readers): a load takes 0.56, 0.34, 0.33, 0.33 s, a
    restore at level 1 0.68, 0.44, 0.37, 0.43.
    """
    return min(8, len(os.sched_getaffinity(0)) + 1)
