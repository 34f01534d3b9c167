"""The page cache: what puts a checkpoint out of it, or into it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint."""
    return [each for each in (path, *path.rglob("*")) if each.is_file()]


def drop(path: Path) -> None:
    """Put a checkpoint out of the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    left = sum(resident_pages(file) for file in files_of(path))
    if left:
        raise RuntimeError(f"{left} pages of {path.name} stay in the page cache")


def warm(path: Path) -> None:
    """Put a checkpoint into the page cache."""
    buffer = bytearray(1 << 20)
    for file in files_of(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident_pages(file: Path) -> int:
    """Return how many pages of a file are in the page cache."""
    length = file.stat().st_size
    if not length:
        return 0
    with open(file, "rb") as opened:
        mapping = np.frombuffer(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    if ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(mapping.ctypes.data),
        ctypes.c_size_t(length),
        ctypes.c_void_p(pages.ctypes.data),
    ):
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(pages & 1))


def trim() -> None:
    """Give the memory that nobody uses back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
