"""Layout: where the bytes of every leaf go, in one *address space*.

All bulk of a state is laid end to end in it, so 20,000 small tensors take as many bytes as they
have; chunks.py cuts it. What each leaf's bytes are read from, and which leaves share it, is found
by sources.py.

A *group* is a run of sources that may be in one chunk: of one element type, since coding depends on
it, and one kind of staging.

Layouts hold no tensors. One is valid as long as the signature of the leaves is the same, so the
second save of the same training state costs one comparison. Pure: no threads, no files, no clock.

What there is one of for every leaf is a Struct that the garbage collector does not track, and the
comparison keeps no objects: 20,000 leaves of either kind set off full collections, which made 0.12
of the 0.19 s that a save then blocked (now 0.06).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from ..errors import Problem, StateError
from ..format.dtypes import DTYPES
from ..format.records import ShardRecord, TensorRecord
from .flatten import Bulk, Flat
from .sources import Key, Source, View, find_sources, place
from .values import TORCH_DTYPES


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where one leaf is: the address of its first element, and how to step from there.

    ``strides`` (in elements) is None when the elements lie in row-major order.
    """

    kind: str  # "torch", "numpy" or "bytes"
    dtype: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None
    requires_grad: bool
    parameter: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Sources that may share chunks, end to end in the address space.

    Attributes:
        sources: their numbers, in address order.
        dtype: name of the torch dtype of their elements, which decides the coding.
        late: may be staged until the fence; otherwise before ``save`` returns.
        nbytes: length of all.
    """

    sources: tuple[int, ...]
    dtype: str
    late: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes.

    Attributes:
        placements: one for every leaf, in order.
        sources: in order of appearance.
        groups: in address order.
        nbytes: length of the address space.
        source_of: of each leaf, the number of the source that it is part of.
    """

    placements: tuple[Placement, ...]
    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    nbytes: int
    source_of: tuple[int, ...]


class Layouts:
    """Makes layouts and keeps the last one. Used by one thread at a time.

    Some leaves are new objects in every save (``RngState`` makes them), so a leaf that was moved
    does not end a layout by itself: only one whose move could have made or broken a tie does.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._late: list[bool] = []
        self._frozen: list[bool] = []
        self._forms: list[Any] = []
        self._places: list[int] = []
        self._arrays: dict[int, weakref.ref[Any]] = {}  # while one lives, its id is its own
        self._lows = self._extents = np.empty(0, np.uint64)
        self._alone = np.empty(0, np.bool_)
        self._storages: list[tuple[int, tuple[int, int]]] = []

    def of(self, flat: Flat) -> Layout:
        """Return the layout of these leaves: the last one, where it still holds.

        Raises:
            StateError: a tensor has no memory; it is named.
        """
        values: list[Any] = flat.values
        same = (
            flat.late == self._late
            and flat.frozen == self._frozen
            and len(values) == len(self._forms)
            and self._layout is not None
        )
        places = []
        for i, value in enumerate(values):  # once: with many tensors, each is in no cache
            same = same and _form(value) == self._forms[i]
            places.append(value.data_ptr() if type(value) in _TENSORS else id(value))
        if places and min(places) < _LOW:
            _check_memory(flat, places)
        same = same and all(_storage(values[i]) == storage for i, storage in self._storages)
        if not same or not self._still_tied_alike(values, places):
            self._layout, views = _lay_out(flat)
            self._remember(self._layout, values, views)
            self._late, self._frozen = flat.late, flat.frozen
        self._places = places
        assert self._layout is not None
        return self._layout

    def _remember(self, layout: Layout, values: Sequence[Bulk], views: Sequence[View]) -> None:
        """Note what the next state must be like for this layout to hold."""
        shared: dict[Any, Any] = {}
        self._forms = [shared.setdefault(form, form) for form in map(_form, values)]
        self._extents = np.array([view.high - view.low for view in views], np.uint64)
        self._lows = np.array([place(value) for value in values], np.uint64)
        self._alone = _apart(self._lows, self._extents)
        self._arrays = {}
        self._note_arrays(values, range(len(values)))
        self._storages = [
            (source.leaf, _storage(values[source.leaf]))
            for source in layout.sources
            if source.in_storage
        ]

    def _still_tied_alike(self, values: Sequence[Bulk], places: list[int]) -> bool:
        """Whether every leaf that moved had its memory to itself, and has so where it is now."""
        gone = [i for i, array in self._arrays.items() if array() is None]
        if places == self._places and not gone:
            return True
        pairs = enumerate(zip(places, self._places, strict=True))
        moved = sorted({i for i, (now, before) in pairs if now != before}.union(gone))
        self._lows[moved] = [place(values[i]) for i in moved]
        self._note_arrays(values, moved)
        before, self._alone = self._alone, _apart(self._lows, self._extents)
        return bool((before[moved] & self._alone[moved]).all())

    def _note_arrays(self, values: Sequence[Bulk], leaves: Iterable[int]) -> None:
        for i in leaves:
            value = values[i]
            if isinstance(value, np.ndarray):
                self._arrays[i] = weakref.ref(value)


_Numbers = np.ndarray[Any, np.dtype[np.uint64]]


def _apart(lows: _Numbers, extents: _Numbers) -> Any:
    """Return, for every leaf, whether its memory is part of no other leaf's."""
    apart = np.ones(lows.size, np.bool_)
    some = np.flatnonzero(extents)
    if some.size:
        order = some[np.argsort(lows[some], kind="stable")]
        clear = lows[order[1:]] >= np.maximum.accumulate(lows[order] + extents[order])[:-1]
        apart[order] = np.append(True, clear) & np.append(clear, True)
    return apart


_LOW = 1 << 32  # no memory, and an offset of as much; of real addresses, few are below it


def _check_memory(flat: Flat, places: list[int]) -> None:
    problems = []
    for name, value, at in zip(flat.names, flat.values, places, strict=True):
        some = at < _LOW and isinstance(value, torch.Tensor) and value.numel() > 0
        if some and not _storage(value)[1]:
            hint = (
                "its storage was resized to nothing, as sharded training does between steps; save "
                "it while it is there, or its shards"
            )
            problems.append(Problem(name, "tensor that has no memory", hint))
    if problems:
        raise StateError(problems=problems)


def _storage(value: Any) -> tuple[int, int]:
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})  # flatten() lets no others through
_COMPLEX = frozenset(
    dtype for name, dtype in TORCH_DTYPES.items() if name in DTYPES and DTYPES[name].complex
)


def _form(value: Any) -> Any:
    # a third of what a small tensor costs: every line is 0.05 to 0.15 µs
    kind = type(value)
    if kind in _TENSORS:
        dtype = value.dtype
        return (
            value.shape,
            dtype,
            value.device,
            None if value.is_contiguous() else value.stride(),
            value.requires_grad,
            value.is_neg() or (dtype in _COMPLEX and value.is_conj()),
            kind,
        )
    if kind is np.ndarray:
        return (value.shape, value.dtype, value.flags.c_contiguous)
    return len(value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: ``float32``."""
    return str(dtype).removeprefix("torch.")


def _lay_out(flat: Flat) -> tuple[Layout, list[View]]:
    sources, keys, views = find_sources(flat.values, flat.late, flat.frozen)
    members_of: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        if sources[i].nbytes:
            members_of.setdefault(key, []).append(i)
    starts = [0] * len(sources)
    groups, end = [], 0
    for (_, dtype, is_late, _), members in members_of.items():
        # Likes side by side: all exp_avg, then all exp_avg_sq. Chunks of one kind of numbers are
        # smaller when they are encoded: measured on AdamW's state, by 2 %.
        members.sort(key=lambda i: flat.names[sources[i].leaf].rpartition(".")[2])
        begin = end
        for i in members:
            starts[i] = end
            end += sources[i].nbytes
        groups.append(Group(tuple(members), dtype, is_late, end - begin))
    placements = []
    for value, view in zip(flat.values, views, strict=True):
        start = starts[view.source] + view.offset if sources[view.source].nbytes else 0
        placements.append(_placement(value, start, view))
    source_of = tuple(view.source for view in views)
    return Layout(tuple(placements), tuple(sources), tuple(groups), end, source_of), views


def _placement(value: Bulk, start: int, view: View) -> Placement:
    if isinstance(value, torch.Tensor):
        return Placement(
            "torch",
            dtype_name(value.dtype),
            tuple(value.shape),
            start,
            view.strides,
            value.requires_grad,
            type(value) is torch.nn.Parameter,
        )
    if isinstance(value, np.ndarray):
        return Placement("numpy", value.dtype.str, value.shape, start, None, False, False)
    return Placement("bytes", "uint8", (len(value),), start, None, False, False)


def tensor_records(names: Sequence[str], layout: Layout) -> list[TensorRecord]:
    """Return the records of a layout's leaves, each whole and in one shard."""
    return [
        TensorRecord(
            # a name is for people: what UTF-8 cannot say is escaped
            name=name.encode("utf-8", "backslashreplace").decode(),
            dtype=place.dtype,
            shape=list(place.shape),
            shards=[
                ShardRecord(
                    start=place.start,
                    strides=None if place.strides is None else list(place.strides),
                )
            ],
            kind=place.kind,
            requires_grad=place.requires_grad,
            parameter=place.parameter,
        )
        for name, place in zip(names, layout.placements, strict=True)
    ]
