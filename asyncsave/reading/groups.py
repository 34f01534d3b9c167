"""Groups: leaves that shared memory when they were saved, and are to share it again. Pure."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import msgspec

from ..errors import FormatError
from ..format.leaf import Leaf

_MOST_ALIGNED = 16
"""Longer elements than this, of text, need not be aligned to their length."""


class Group(msgspec.Struct, frozen=True, gc=False):
    """Leaves in one piece of memory.

    Attributes:
        rank: whose addresses they have.
        start: the first address that any of them has.
        stop: the address behind the last one.
        pad: bytes to leave free before ``start`` in memory aligned to 16, for all to be aligned.
        members: the leaves.
    """

    rank: int
    start: int
    stop: int
    pad: int
    members: tuple[Leaf, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes of address space they have."""
        return self.stop - self.start


def grouped(leaves: Iterable[Leaf]) -> list[Group]:
    """Return leaves in groups: those whose addresses overlap are in one. An empty one is alone.

    Raises:
        FormatError: leaves overlap in a way in which not all can be aligned.
    """
    groups: list[Group] = []
    empty: list[Group] = []
    members: list[Leaf] = []
    rank = stop = 0
    for leaf in sorted(leaves, key=operator.attrgetter("rank", "start", "stop", "index")):
        if not leaf.nbytes:
            empty.append(Group(leaf.rank, 0, 0, 0, (leaf,)))
            continue
        if members and (leaf.start >= stop or leaf.rank != rank):
            groups.append(_group(members, stop))
            members = []
        stop = max(stop, leaf.stop) if members else leaf.stop
        rank = leaf.rank
        members.append(leaf)
    if members:
        groups.append(_group(members, stop))
    return groups + empty


def _group(members: list[Leaf], stop: int) -> Group:
    """Return the group of leaves, the first one first, that end at ``stop``."""
    rank, start = members[0].rank, members[0].start
    pad = 0 if len(members) == 1 else _pad(members, start)
    return Group(rank, start, stop, pad, tuple(members))


def _pad(members: list[Leaf], start: int) -> int:
    items = [(leaf.start - start, leaf.dtype.nbytes) for leaf in members]
    items = [(offset, width) for offset, width in items if width <= _MOST_ALIGNED]
    for pad in range(_MOST_ALIGNED):
        if all((offset + pad) % width == 0 for offset, width in items):
            return pad
    raise FormatError("tensors that share memory in the checkpoint are not aligned to it")
