"""Ties: leaves whose addresses overlap, which shared memory and are to share it again. Pure."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence

from .leaf import Leaf

_MOST_ALIGNED = 16
"""Longer elements than this, of text, need not be aligned."""


def overlapping(leaves: Iterable[Leaf]) -> Iterator[list[Leaf]]:
    """Yield leaves in lists, in address order: those whose addresses overlap are in one.

    Args:
        leaves: any but empty ones, which have no addresses.
    """
    members: list[Leaf] = []
    rank = stop = 0
    for leaf in sorted(leaves, key=operator.attrgetter("rank", "start", "stop", "index")):
        if members and (leaf.start >= stop or leaf.rank != rank):
            yield members
            members = []
        stop = max(stop, leaf.stop) if members else leaf.stop
        rank = leaf.rank
        members.append(leaf)
    if members:
        yield members


def padding(members: Sequence[Leaf]) -> int | None:
    """Return how many bytes to leave free before leaves that overlap, so that all are aligned.

    In memory that is aligned to 16, that is. None: there is no such number. If there is one for all
    leaves of a checkpoint that overlap, there is one for any of them.
    """
    start = members[0].start
    places = {(leaf.start - start, leaf.dtype.nbytes) for leaf in members}
    # of text, whose elements may have any length, what is a power of two in it
    steps = {(offset, nbytes & -nbytes) for offset, nbytes in places if nbytes <= _MOST_ALIGNED}
    for pad in range(_MOST_ALIGNED):
        if all((offset + pad) % step == 0 for offset, step in steps):
            return pad
    return None
