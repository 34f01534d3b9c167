"""Groups: leaves that shared memory when they were saved, and are to share it again. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ..format.leaf import Leaf
from ..format.ties import overlapping, padding


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
    """Return leaves in groups: those whose addresses overlap are in one. An empty one is alone."""
    some: list[Leaf] = []
    empty: list[Group] = []
    for leaf in leaves:
        if leaf.nbytes:
            some.append(leaf)
        else:
            empty.append(Group(leaf.rank, 0, 0, 0, (leaf,)))
    return [_group(members) for members in overlapping(some)] + empty


def _group(members: list[Leaf]) -> Group:
    first = members[0]
    if len(members) == 1:
        return Group(first.rank, first.start, first.stop, 0, (first,))
    pad = padding(members)
    assert pad is not None, "checked.py lets no others through"
    return Group(first.rank, first.start, max(leaf.stop for leaf in members), pad, tuple(members))
