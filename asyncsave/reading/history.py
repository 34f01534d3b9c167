"""History: the checkpoints of a run's directory in the order in which they were committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointNotFoundError, LoadError
from ..format.lineage import Lineage
from ..format.records import CheckpointRecord
from ..storage.place import Place
from ..storage.steps import check_name, list_steps, step_name
from .files import read_record


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of a run's directory: its record, or why that cannot be had.

    Attributes:
        stray: the run cannot have committed it under that name, as it is no checkpoint, or the copy
            of another one.
    """

    step: int
    place: Place
    record: CheckpointRecord | None = None
    error: LoadError | None = None
    stray: bool = False

    @property
    def path(self) -> Path:
        """Where it is, for people."""
        return self.place.path

    @property
    def lineage(self) -> Lineage:
        """Its own; that of one without a serial where the record cannot be had."""
        return Lineage() if self.record is None else self.record.lineage


@dataclass(frozen=True, slots=True)
class History:
    """All checkpoints of a run's directory.

    Attributes:
        line: newest first: what the run may go on from by itself.
        left: newest first: what rollbacks left, which is restored only when its step is asked for.
        top: the highest serial that may have been used.
    """

    line: tuple[Entry, ...]
    left: tuple[Entry, ...]
    top: int

    @property
    def entries(self) -> list[Entry]:
        """All of them, newest first."""
        placed = []
        serial = self.top
        for each in self.line:
            serial = serial if each.record is None else each.lineage.serial
            placed.append((serial, each))
        placed += [(each.lineage.serial, each) for each in self.left]
        return [each for _, each in sorted(placed, key=lambda pair: -pair[0])]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> History:
        """Put checkpoints in order.

        A checkpoint whose record cannot be had has no serial. It is taken for an older one where
        there is room for it: in the line, a gap in the serials between the two steps that its own
        is between; or a serial that was left and that no other one has. Otherwise it is newer than
        all others, and those that it cannot have come from, being of later steps, are taken for
        left: the damage of the newest checkpoint must not bring back what a rollback had left. What
        is stray says nothing of the others.
        """
        known = [each for each in entries if each.record is not None]
        known.sort(key=lambda each: (each.lineage.serial, each.step))
        head = known[-1].lineage if known else Lineage()
        order = _Order(
            [each for each in known if head.came_from(each.lineage.serial)],
            [each for each in known if not head.came_from(each.lineage.serial)],
        )
        order.add_unreadable(_by_step(entries, stray=False), head)
        order.add_strays(_by_step(entries, stray=True))
        top = head.serial + len(entries) - len(known)
        return cls(tuple(reversed(order.line)), tuple(reversed(order.left)), top)


def _by_step(entries: Iterable[Entry], *, stray: bool) -> list[Entry]:
    """Return those whose record cannot be had, strays or the others."""
    found = [each for each in entries if each.record is None and each.stray == stray]
    return sorted(found, key=lambda each: each.step)


@dataclass(slots=True)
class _Order:
    """A history while it is made: its line and what was left, oldest first."""

    line: list[Entry]
    left: list[Entry]

    def add_unreadable(self, entries: Iterable[Entry], head: Lineage) -> None:
        """Put checkpoints without a serial where they may have been committed.

        Args:
            entries: in order of steps.
            head: the place of the newest checkpoint that has one.
        """
        newer = []
        spare = sum(last - first + 1 for first, last in head.left) - len(self.left)
        for each in entries:
            at = _gap(self.line, each.step)
            if at is not None:
                self.line.insert(at, each)
            elif spare > 0:
                self.left.insert(0, each)
                spare -= 1
            else:
                newer.append(each)
        if newer:
            first = newer[0].step
            self.left += [each for each in self.line if each.step > first]
            self.line = [each for each in self.line if each.step < first] + newer

    def add_strays(self, entries: Iterable[Entry]) -> None:
        """Put strays where their steps say: they are tried, so that somebody hears of them."""
        for each in entries:
            before = [at for at, other in enumerate(self.line, 1) if other.step < each.step]
            self.line.insert(before[-1] if before else 0, each)


def _gap(line: Sequence[Entry], step: int) -> int | None:
    """Return where in ``line``, oldest first, an older checkpoint of ``step`` could be."""
    before = Lineage()
    for at, each in enumerate(line):
        if each.record is None:
            continue
        if each.step > step:
            serial = each.lineage.serial
            none_have_one = serial == before.serial == 0
            return at if serial > before.serial + 1 or none_have_one else None
        before = each.lineage
    return None


def read_history(run: Place, known: dict[int, CheckpointRecord] | None = None) -> History:
    """Return the checkpoints of a run in order.

    Args:
        known: records that were read before, by step; what is read now is added.

    Raises:
        LoadError: the directory cannot be read.
    """
    known = {} if known is None else known
    entries = []
    for step in list_steps(run):
        place = run / step_name(step)
        record, stray = known.get(step), False
        try:
            if record is None:
                record = read_record(place)
                stray = True
                check_name(place, record.step)
                known[step] = record
            entries.append(Entry(step, place, record))
        except LoadError as error:
            stray = stray or isinstance(error, CheckpointNotFoundError)
            entries.append(Entry(step, place, error=error, stray=stray))
    return History.of(entries)
