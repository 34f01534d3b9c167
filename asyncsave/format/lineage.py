"""Lineage: what a checkpoint knows of its place in a run.

Numbers of steps do not say which checkpoint is the newest. A run that was rolled back to step 10
and went on has

    serial     1      2      3
    step      10 ─┬─ 20 ─── 30       left by the rollback
                  └─ 15 ─── 25       the line: 10, 15, 25
    serial            4      5

so each checkpoint records its *serial*, the place in the order in which the run's checkpoints were
committed, from 1; its *parent*, the serial of the one whose state it goes on from; and the serials
that were *left* by rollbacks before it. The newest checkpoint is the one of the highest serial, and
its *line* is what it came from: all lower serials but those that were left. Ranges, because a
parent may have been pruned: what is gone says nothing of its own parent any more. Pure: no threads,
no files, no clock.
"""

from __future__ import annotations

import itertools

import msgspec

_MOST = 2**53  # what every reader of JSON can count to


class Lineage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The place of one checkpoint in its run, as ``checkpoint.json`` has it.

    Attributes:
        serial: its place in the order of commits, from 1; 0: it was not made by a Checkpointer.
        parent: the serial of the checkpoint that it goes on from; None: it is a beginning.
        left: ascending ranges (first, last) of serials before it that it does not go on from.
    """

    serial: int = 0
    parent: int | None = None
    left: tuple[tuple[int, int], ...] = ()

    @property
    def is_possible(self) -> bool:
        """Whether the numbers can be what they say."""
        ends = [0, *itertools.chain.from_iterable(self.left)]
        return (
            0 <= self.serial < _MOST
            and (self.parent is None or 1 <= self.parent < self.serial)
            and all(first <= last for first, last in self.left)
            and all(last < first for last, first in zip(ends[::2], ends[1::2], strict=False))
            and ends[-1] < max(1, self.serial)
        )

    def came_from(self, serial: int) -> bool:
        """Whether the checkpoint of ``serial`` is this one, or one that it goes on from."""
        return serial <= self.serial and not any(
            first <= serial <= last for first, last in self.left
        )

    def next(self, top: int) -> Lineage:
        """Return that of a checkpoint which goes on from this one.

        Args:
            top: the highest serial that was used. What was committed after this one is left then.
        """
        left = self.left
        if top > self.serial:
            first = self.serial + 1
            if left and left[-1][1] == self.serial:
                first, left = left[-1][0], left[:-1]
            left = (*left, (first, top))
        return Lineage(max(top, self.serial) + 1, self.serial or None, left)


NO_LINEAGE = Lineage()
"""That of a checkpoint which was saved by itself."""
