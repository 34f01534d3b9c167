"""Pages: memory from the system in whole pages."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np

PAGE_BYTES = 4096

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def padded(length: int) -> int:
    """Return ``length`` in bytes, rounded up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def pages(nbytes: int, *, huge: bool = False) -> Bytes:
    """Return new memory, aligned to pages: zeros, taken from the system as it is touched.

    Forked children do not inherit it: O_DIRECT to or from memory that a fork made copy-on-write can
    corrupt what is transferred, see open(2).

    Huge pages are for little memory that is read into. Measured on a virtual machine: the first
    copy of 1.62 GB takes 0.4 to 0.5 s, and 0.2 to 2.6 s with them, as they come from where the host
    may not have given any memory yet. Later copies take 0.12 s both ways; to write from ordinary
    pages with O_DIRECT takes a tenth longer, to read into them twice as long. By bench/knobs.py
    huge: the first save blocks for 0.39 s, with huge pages for 0.76; a cold restore at level 1,
    which reads into them, takes 0.38 s, without 0.58.
    """
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_DONTFORK)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)
