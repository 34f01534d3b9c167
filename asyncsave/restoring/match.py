"""Match: what was found of a live state beside a checkpoint's tree: records, and no live value
changed.

Where there are no reasons against the restore, these say what is to be done: what to fill, which
objects to let load, and which items of containers to replace. matcher.py makes them, apply.py
carries them out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..errors import MismatchError
from ..format.tree import Node
from ..state.classes import remade
from .live import Target

NOTHING = object()


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a value is: a dict or a list, and its key there; a slice is all of a list."""

    container: Any
    key: Any

    def put(self, new: Any) -> None:
        """Put another value there."""
        self.container[self.key] = new

    def now(self) -> Any:
        """Return what is there, to be put back; ``NOTHING`` for nothing."""
        try:
            return self.container[self.key]
        except KeyError:
            return NOTHING

    def put_back(self, old: Any) -> None:
        """Put back what `now` returned."""
        if old is NOTHING:
            del self.container[self.key]
        else:
            self.put(old)


class Contents(msgspec.Struct, frozen=True, gc=False):
    """All that is in a container: a set, a deque or a Counter."""

    container: Any

    def now(self) -> Any:
        """Return what is there, to be put back."""
        return copy.copy(self.container)

    def put_back(self, old: Any) -> None:
        """Put back what `now` returned."""
        self.put(old)

    def put(self, new: Any) -> None:
        """Put other contents there."""
        self.container.clear()
        add = getattr(self.container, "extend", None) or self.container.update
        add(new)


class Edit(msgspec.Struct, frozen=True, gc=False):
    """A value to make of ``node`` and to put in a place at the end.

    Attributes:
        place: where to.
        node: the record.
        name: its fqn.
        live: what is there now: the new value is of the same classes.
    """

    place: Place | Contents
    node: Node
    name: str
    live: Any = None


class TupleEdit(msgspec.Struct, frozen=True, gc=False):
    """A tuple to make anew, once the items that change in it have been put into ``items``.

    So is a dataclass that is frozen, of which ``items`` is a dict.
    """

    place: Place
    old: Any
    items: Any
    name: str

    def made(self) -> Any:
        """Return a tuple of these items, of the same type."""
        kind: Any = type(self.old)
        if isinstance(self.items, dict):
            return remade(self.old, self.items)
        return kind(*self.items) if hasattr(self.old, "_fields") else kind(self.items)


class Loading(msgspec.Struct, frozen=True, gc=False):
    """An object that is to load by itself.

    Attributes:
        into: the object.
        name: its fqn.
        node: the records for its ``load_state_dict``.
        keys: of a module, the names in its ``state_dict()``.
        casts: of an optimizer, the dtypes of what is converted, by parameter and entry.
    """

    into: Any
    name: str
    node: Node
    keys: frozenset[str] = frozenset()
    casts: dict[tuple[str, str], torch.dtype] = {}


@dataclass(slots=True)
class Match:
    """A live state beside a checkpoint's tree: what differs, and what is to be done.

    Attributes:
        reasons: the differences that forbid the restore.
        targets: live tensors and arrays to fill.
        objects: objects to let load.
        edits: items of containers to replace at the end.
        tuples: tuples to make anew after that, inner ones first.
        missing: names that only the state has.
        unexpected: names that only the checkpoint has.
        cast_names: names of tensors whose dtype is converted.
        copies: names of dicts that look like what an optimizer's ``state_dict()`` has returned.
        absent: what matched nothing, though there are values in it.
    """

    reasons: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    objects: list[Loading] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    tuples: list[TupleEdit] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast_names: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    absent: dict[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """How much there is to be done."""
        return len(self.targets) + len(self.objects) + len(self.edits)

    def changes(self, container: Any, edits: int = 0, tuples: int = 0) -> bool:
        """Whether an item of ``container`` is to be replaced.

        Args:
            edits, tuples: how many of the first need not be looked at.
        """
        places = [each.place for each in self.edits[edits:]]
        places += [each.place for each in self.tuples[tuples:]]
        return any(place.container is container for place in places)

    def untouched(self) -> list[str]:
        """Return the names of parts of the state, as large as can be, that matched nothing."""
        return [name for name in self.absent if not any(up in self.absent for up in _above(name))]


def make_tuples(path: Path, match: Match, values: Sequence[Any]) -> list[tuple[Place, Any]]:
    """Return the tuples to put into the state, and where; nothing in it is changed yet.

    Args:
        path: the checkpoint's.
        match: whose tuples they are.
        values: what its edits put in their places.

    Raises:
        MismatchError: a type of the user's own makes none of what was saved.
    """
    lists = {id(each.items) for each in match.tuples}  # those are no part of the state
    for edit, value in zip(match.edits, values, strict=True):
        if id(edit.place.container) in lists:
            edit.place.put(value)
    made: list[tuple[Place, Any]] = []
    reasons = []
    for each in match.tuples:
        try:
            new = each.made()
        except Exception as error:
            kind = type(each.old).__name__
            reasons.append(
                f"{show(each.name)}: no {kind} can be made of what was saved, by {kind}(…): "
                f"{error!r}; use a plain tuple or a list there"
            )
            continue
        if id(each.place.container) in lists:
            each.place.put(new)
        else:
            made.append((each.place, new))
    if reasons:
        raise MismatchError(f"{path} does not fit the state:", reasons)
    return made


def show(name: str) -> str:
    """Return an fqn as messages show it."""
    return name or "the state itself"


def _above(name: str) -> Iterator[str]:
    """Yield the names of everything that ``name`` may be in."""
    if name:
        yield ""
    words = name.split(".")
    yield from (".".join(words[:i]) for i in range(1, len(words)))
