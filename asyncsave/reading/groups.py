"""Groups: leaves that shared memory when they were saved, and are to share it again. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import FormatError
from ..format.manifest import TensorRecord, extent_bytes, item_bytes


@dataclass(frozen=True, slots=True)
class Group:
    """Leaves in one piece of memory.

    Attributes:
        start: the first address that any of them has.
        stop: the address behind the last one.
        pad: bytes to leave free before ``start`` in memory aligned to 16, for all to be aligned.
        members: their indices.
    """

    start: int
    stop: int
    pad: int
    members: tuple[int, ...]


def grouped(tensors: Sequence[TensorRecord], indices: Iterable[int]) -> list[Group]:
    """Return leaves in groups: those whose addresses overlap are in one. An empty one is alone.

    Raises:
        FormatError: leaves overlap in a way in which not all can be aligned.
    """
    groups: list[Group] = []
    spans = [(tensors[i].shards[0].start, extent_bytes(tensors[i]), i) for i in indices]
    start = stop = 0
    members: list[int] = []
    for first, nbytes, i in sorted(span for span in spans if span[1]):
        if first >= stop:
            if members:
                groups.append(_group(tensors, start, stop, members))
            start, members = first, []
        stop = max(stop, first + nbytes)
        members.append(i)
    if members:
        groups.append(_group(tensors, start, stop, members))
    return groups + [Group(0, 0, 0, (i,)) for _, nbytes, i in spans if not nbytes]


def _group(tensors: Sequence[TensorRecord], start: int, stop: int, members: list[int]) -> Group:
    if len(members) == 1:
        return Group(start, stop, 0, tuple(members))
    items = [(tensors[i].shards[0].start, item_bytes(tensors[i])) for i in members]
    items = [(first, width) for first, width in items if width <= 16]
    for pad in range(16):
        if all((first - start + pad) % width == 0 for first, width in items):
            return Group(start, stop, pad, tuple(members))
    raise FormatError("tensors that share memory in the checkpoint are not aligned to it")
