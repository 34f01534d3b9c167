"""Codings: what each coding id of a chunk means for its length.

An id goes on disk and never changes meaning; what it does to bytes is in codec/planes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Layout:
    """What one coding id means for lengths.

    Attributes:
        element_bytes: width of one element.
        plane_bytes: what one element gives to each plane, in bytes, without its exponent.
        base: what is added to exponents; None for codings that have none.
    """

    element_bytes: int
    plane_bytes: tuple[int, ...]
    base: int | None = None


_BASES: Final = range(16)


LAYOUTS: Final = {  # every coding id of format 1
    "raw": Layout(1, (1,)),
    "zstd": Layout(1, (1,)),
    "bytes2": Layout(2, (1,) * 2),
    "bytes4": Layout(4, (1,) * 4),
    "bytes8": Layout(8, (1,) * 8),
    **{f"exp16.{base}": Layout(2, (1,), base) for base in _BASES},
    **{f"exp32.{base}": Layout(4, (2, 1), base) for base in _BASES},
}


def plane_lengths(coding: str, raw_length: int) -> tuple[int, ...]:
    """Returns the length of each plane of a chunk, in bytes, in stored order.

    Args:
        coding: a coding id.
        raw_length: length of the chunk in bytes.

    Raises:
        ValueError: unknown coding, or `raw_length` is not a whole number of its elements.
    """
    layout = LAYOUTS.get(coding)
    if layout is None:
        raise ValueError(f"unknown coding {coding!r:.40}")
    count, rest = divmod(raw_length, layout.element_bytes)
    if rest or count < 0:
        raise ValueError(
            f"{raw_length} bytes are not a whole number of {layout.element_bytes}-byte elements"
        )
    lengths = tuple(count * width for width in layout.plane_bytes)
    return lengths if layout.base is None else (*lengths, count - count // 2, count // 2)
