"""Workers: a few threads that live as long as one call, each with memory to decode chunks in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..codec.frame import Decoder
from ..errors import LoadError
from ..pages import pages

_SCRATCH_BYTES = 512 << 20
"""What all threads take, except that one may take three times the longest chunk."""

_LITTLE_BYTES = 1 << 20
"""Of so little, starting threads takes longer than reading it: a load of 150 kB 2.8 ms, not 1.9."""

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
    local = threading.local()
    stop = threading.Event()

    def run(item: _T) -> None:
        if stop.is_set():
            return
        if not hasattr(local, "scratch"):
            local.scratch = Scratch(longest)
        try:
            job(item, local.scratch)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="asyncsave-read") as pool:
        futures = [pool.submit(run, item) for item in items]
    for future in futures:
        future.result()


def reader_threads() -> int:
    """Return how many threads read: one more than the cores, eight at most.

    So the disk has something to do while chunks are checked, decoded and copied.
    """
    return min(8, len(os.sched_getaffinity(0)) + 1)
