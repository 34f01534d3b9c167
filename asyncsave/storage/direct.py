"""Direct: reading a local file past the page cache, where that is faster.

A read takes one of two ways. What is in the page cache is copied from there, at memory's speed.
What is not is read with O_DIRECT: measured, 1 GiB cold in four threads, 2.9 GB/s for 0.03 s of CPU;
through the cache 1.1 to 1.9 GB/s for 0.3 to 1.0 s, and a training job's cache is pushed out.

O_DIRECT wants page-aligned memory, and likes huge pages: measured, 2.5 to 3 GB/s into these, 1.1
into small ones. Other memory is filled by way of a few such MiB, copied from while they are in the
CPU's cache. Whoever refuses O_DIRECT is read through the cache.

Who calls what: any threads may read from one file at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from ..pages import PAGE_BYTES, Bytes, pages

# Opening a pipe must not wait for its writer.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_LEAST_BYTES = 512 << 10
"""Shorter reads go through the page cache: its readahead serves the next one, too.

Measured (bench/knobs.py direct): in pieces of 256 KiB a file is read in 0.17 s past the cache and
in 0.09 through it, in pieces of 512 KiB in 0.066 and 0.084, of 2 MiB in 0.046 and 0.053.
"""

_DETOUR_BYTES = 4 << 20
"""Memory that is not aligned gets its bytes by way of some that is, so much at a time. From 1 to 16
MiB make no difference (bench/knobs.py detour).
"""

_MINCORE: Any = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)


class LocalReadable:
    """A regular file, open for reading.

    Attributes:
        nbytes: its length.
    """

    _descriptor = _direct = -1

    def __init__(self, path: Path) -> None:
        self._detours: list[Bytes] = []
        self._mapping: Bytes | None = None
        self._descriptor = os.open(path, _FLAGS)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self.nbytes = status.st_size
        if self.nbytes >= _LEAST_BYTES and _MINCORE is not None:
            self._open_direct()

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from byte ``offset`` on; return how much there was."""
        done = 0
        aligned = self._direct >= 0 and offset % PAGE_BYTES == 0
        if aligned and view.nbytes >= _LEAST_BYTES and not self.is_cached(offset, view.nbytes):
            done = self._read_direct(offset, np.frombuffer(view, np.uint8))
        while done < view.nbytes:
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def skip_hole(self, offset: int) -> int:
        """Return the first offset from this one on that may hold anything but zeros."""
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as cause:
            return self.nbytes if cause.errno == errno.ENXIO else offset

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether most of these bytes are in the page cache, as far as anybody can tell."""
        first = offset // PAGE_BYTES * PAGE_BYTES
        nbytes = min(offset + nbytes, self.nbytes) - first
        if self._mapping is None or nbytes <= 0:
            return True
        resident = np.empty(-(-nbytes // PAGE_BYTES), np.uint8)
        address = ctypes.c_void_p(self._mapping.ctypes.data + first)
        if _MINCORE(address, ctypes.c_size_t(nbytes), ctypes.c_void_p(resident.ctypes.data)) != 0:
            return True
        return 2 * int(np.count_nonzero(resident & 1)) >= resident.size

    def close(self) -> None:
        """Close it. No read may be going on."""
        self._mapping = None
        self._detours.clear()
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()  # whoever was interrupted before the file was in anybody's hands

    def _open_direct(self) -> None:
        # by way of /proc: the file that is open already, whatever its name leads to by now
        name = f"/proc/self/fd/{self._descriptor}"
        try:
            mapping = mmap.mmap(self._descriptor, self.nbytes, prot=mmap.PROT_READ)
            self._direct = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (OSError, ValueError):
            return  # read through the page cache, as any filesystem can be
        self._mapping = np.frombuffer(mapping, np.uint8)

    def _read_direct(self, offset: int, memory: Bytes) -> int:
        """Fill what can be filled without the page cache; return how much that was."""
        done = 0
        while done < memory.size:
            rest = memory[done:]
            whole = rest.size // PAGE_BYTES * PAGE_BYTES
            try:
                if rest.ctypes.data % PAGE_BYTES == 0 and whole:
                    count = os.preadv(self._direct, [rest[:whole].data], offset + done)
                else:
                    count = self._detour(offset + done, rest)
            except OSError as refused:
                if refused.errno != errno.EINVAL:
                    raise
                break
            done += count
            if count == 0 or count % PAGE_BYTES:
                break  # the end of the file, or what cannot go on aligned
        return done

    def _detour(self, offset: int, memory: Bytes) -> int:
        detour = self._detours.pop() if self._detours else pages(_DETOUR_BYTES, huge=True)
        wanted = min(memory.size, _DETOUR_BYTES)
        whole = -(-wanted // PAGE_BYTES) * PAGE_BYTES
        count = min(wanted, os.preadv(self._direct, [detour[:whole].data], offset))
        np.copyto(memory[:count], detour[:count])
        self._detours.append(detour)
        return count
