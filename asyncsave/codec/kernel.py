"""Kernel: what planes.py does, by compiled code where that was built.

planes.py says what every coding means, and is what runs where there was no compiler. kernel.c does
the same at the speed of memory, in one call that releases the GIL. Which one runs is decided at
import: `NAME` says it. ``ASYNCSAVE_KERNEL=numpy`` in the environment asks for planes.py.

This is the compiled code's only caller, and checks every length before it is called.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ..format.codings import LAYOUTS, plane_lengths
from . import planes
from .planes import ByteArray

LIBRARY: Final = Path(__file__).with_name("_kernel.so")
_CODINGS: Final = ("exp16", "exp32", "bytes2", "bytes4", "bytes8")

Split = Callable[[str, ByteArray, ByteArray, ByteArray], str]
Join = Callable[[str, Sequence[ByteArray], ByteArray, ByteArray], None]
Collisions = Callable[[ByteArray, int, int], int]


class Kernel:
    """The compiled code. Any thread may call.

    Raises:
        OSError: it is not there, or not for this machine.
        AttributeError: it lacks an entry.
    """

    def __init__(self, library: Path = LIBRARY) -> None:
        loaded = ctypes.CDLL(str(library))
        self._split = {kind: loaded[f"asyncsave_split_{kind}"] for kind in _CODINGS}
        self._join = {kind: loaded[f"asyncsave_join_{kind}"] for kind in _CODINGS}
        for kind in _CODINGS:
            self._split[kind].restype = ctypes.c_int if kind.startswith("exp") else None
            self._join[kind].restype = None
        # 20 µs, so the GIL is kept: while training runs Python, to get it back may take 5 ms
        self._collisions = ctypes.PyDLL(str(library)).asyncsave_collisions
        self._collisions.restype = ctypes.c_int64

    def split(self, coding: str, raw: ByteArray, out: ByteArray, scratch: ByteArray) -> str:
        """Do what `planes.split` says; ``scratch`` is not needed."""
        kind = coding.partition(".")[0]
        if kind not in self._split:
            return planes.split(coding, raw, out, scratch)
        lengths = plane_lengths(coding, raw.size)
        if sum(lengths) != out.size:
            raise ValueError(f"planes of {raw.size} bytes do not fill {out.size}")
        count = raw.size // LAYOUTS[coding].element_bytes
        base = self._split[kind](_at(raw), _at(out), ctypes.c_size_t(count))
        return coding if base is None else f"{kind}.{base}"

    def join(
        self, coding: str, parts: Sequence[ByteArray], out: ByteArray, scratch: ByteArray
    ) -> None:
        """Do what `planes.join` says; ``scratch`` is not needed."""
        kind = coding.partition(".")[0]
        if kind not in self._join:
            planes.join(coding, parts, out, scratch)
            return
        lengths = plane_lengths(coding, out.size)
        if tuple(part.size for part in parts) != lengths:
            raise ValueError(f"planes of {[part.size for part in parts]} bytes are not {lengths}")
        layout = LAYOUTS[coding]
        count = ctypes.c_size_t(out.size // layout.element_bytes)
        arguments = [*map(_at, parts), _at(out), count]
        if layout.base is not None:
            arguments.append(ctypes.c_int(layout.base))
        self._join[kind](*arguments)

    def collisions(self, plane: ByteArray, pieces: int, piece_bytes: int) -> int:
        """Do what `planes.collisions` says, without letting go of the GIL."""
        sample = planes.spread(plane, pieces, piece_bytes)
        count, nbytes = sample.shape
        sizes = map(ctypes.c_size_t, (count, nbytes, sample.strides[0]))
        return int(self._collisions(_at(plane), *sizes))


def _at(array: ByteArray) -> ctypes.c_void_p:
    if not array.flags.c_contiguous or array.itemsize != 1:
        raise ValueError("bytes are wanted, one behind the other")
    return ctypes.c_void_p(array.ctypes.data)


def _choose() -> tuple[str, Split, Join, Collisions]:
    if os.environ.get("ASYNCSAVE_KERNEL") != "numpy":
        try:
            kernel = Kernel()
        except (OSError, AttributeError):  # not built, for another machine, or by older code
            pass
        else:
            return "compiled", kernel.split, kernel.join, kernel.collisions
    return "NumPy", planes.split, planes.join, planes.collisions


NAME, split, join, collisions = _choose()
"""Which of the two runs, "compiled" or "NumPy"; and its functions, see planes.py."""
