"""Plans: where the bytes of every leaf go. Leaves to chunks.

All bulk of a state is laid end to end in one *address space* of bytes, cut into *chunks*:

    leaf a        leaf b             c  d  e  (leaves of one element type side by side)
    ├────────────┼──────────────────┼──┼──┼─┤
    ├─ chunk 0 ──────┼─ chunk 1 ─────┼─ 2 ──┤   each at most chunk_bytes long

so a chunk is a slice of one large tensor, or many small tensors, or both, and nothing is wasted:
20,000 small tensors are as many chunks as their bytes need. A chunk holds one element type, because
coding depends on it, and one kind of staging.

What each leaf's bytes are read from, and which leaves share it, is found by sources.py.

Plans hold no tensors. A plan is valid as long as the signature of the leaves is the same, so the
second save of the same training state costs one comparison. Pure: no threads, no files, no clock.

What there is one of for every leaf is a Struct that the garbage collector does not track, and the
comparison keeps no objects: 20,000 leaves of either kind set off full collections, which made 0.12
of the 0.19 s that a save then blocked (now 0.06).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from ..errors import StateError
from ..format.dtypes import DTYPES
from ..format.manifest import ShardRecord, TensorRecord
from .flatten import Bulk, Flat
from .sources import Key, Source, View, find_sources, place
from .values import TORCH_DTYPES

ALIGNMENT = 16
"""Every chunk length is cut at a multiple of this, the largest element size of torch, in bytes."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``stop`` of a source, at ``offset`` in its chunk."""

    source: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Unit of encode, checksum and write.

    Attributes:
        index: its number in address order.
        nbytes: length, in bytes.
        dtype: name of the torch dtype of its elements, which decides the coding.
        late: may be staged until the fence; otherwise before ``save`` returns.
        pieces: what it is made of, in order, without gaps.
    """

    index: int
    nbytes: int
    dtype: str
    late: bool
    pieces: tuple[Piece, ...]


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
class Plan:
    """Where everything goes.

    Attributes:
        placements: one for every leaf, in order.
        sources: in order of appearance.
        chunks: in address order.
        groups: bytes of each run of chunks that share element type and staging.
        nbytes: length of the address space.
    """

    placements: tuple[Placement, ...]
    sources: tuple[Source, ...]
    chunks: tuple[Chunk, ...]
    groups: tuple[int, ...]
    nbytes: int


class Planner:
    """Makes plans and keeps the last one. Used by one thread at a time.

    Some leaves are new objects in every save (``RngState`` makes them), so a leaf that was moved
    does not end a plan by itself: only one whose move could have made or broken a tie does.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._fixed: Any = None
        self._forms: list[Any] = []
        self._places: list[int] = []
        self._arrays: dict[int, weakref.ref[Any]] = {}  # while one lives, its id is its own
        self._lows = self._extents = np.empty(0, np.uint64)
        self._alone = np.empty(0, np.bool_)
        self._storages: list[tuple[int, tuple[int, int]]] = []

    def plan(self, flat: Flat, chunk_bytes: int, late: Sequence[bool]) -> Plan:
        """Return the plan for these leaves: the last one, where it still holds.

        Args:
            flat: the state taken apart.
            chunk_bytes: longest chunk, a multiple of ALIGNMENT.
            late: for every leaf, whether its copy may be made until the fence.

        Raises:
            StateError: a tensor has no memory; it is named.
        """
        values: list[Any] = flat.values
        fixed = (chunk_bytes, list(late))
        same = fixed == self._fixed and len(values) == len(self._forms)
        places = []
        for i, value in enumerate(values):  # once: with many tensors, each is in no cache
            same = same and _form(value) == self._forms[i]
            places.append(value.data_ptr() if type(value) in _TENSORS else id(value))
        if places and min(places) < _LOW:
            _check_memory(flat, places)
        same = same and all(_storage(values[i]) == storage for i, storage in self._storages)
        if not same or not self._still_tied_alike(values, places):
            self._plan, views = _make_plan(flat.names, values, chunk_bytes, late)
            shared: dict[Any, Any] = {}
            self._fixed = fixed
            self._forms = [shared.setdefault(form, form) for form in map(_form, values)]
            self._extents = np.array([view.high - view.low for view in views], np.uint64)
            self._lows = np.array([place(value) for value in values], np.uint64)
            self._alone = _apart(self._lows, self._extents)
            self._arrays = {}
            self._note_arrays(values, range(len(values)))
            self._storages = [
                (source.leaf, _storage(values[source.leaf]))
                for source in self._plan.sources
                if source.in_storage
            ]
        self._places = places
        assert self._plan is not None
        return self._plan

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
    for name, value, at in zip(flat.names, flat.values, places, strict=True):
        some = at < _LOW and isinstance(value, torch.Tensor) and value.numel() > 0
        if some and not _storage(value)[1]:
            raise StateError(
                f"the tensor {name!r} has no memory: its storage was resized to nothing, as "
                "sharded training does between steps; save it while it is there, or its shards"
            )


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


def _make_plan(
    names: Sequence[str], values: Sequence[Bulk], chunk_bytes: int, late: Sequence[bool]
) -> tuple[Plan, list[View]]:
    sources, keys, views = find_sources(values, late)
    starts = [0] * len(sources)
    chunks: list[Chunk] = []
    ends = [0]
    groups: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        if sources[i].nbytes:
            groups.setdefault(key, []).append(i)
    for (_, dtype, is_late), members in groups.items():
        # Likes side by side: all exp_avg, then all exp_avg_sq. Chunks of one kind of numbers are
        # smaller when they are encoded: measured on AdamW's state, by 2 %.
        members.sort(key=lambda i: names[sources[i].leaf].rpartition(".")[2])
        ends.append(_cut(members, sources, starts, chunks, ends[-1], chunk_bytes, dtype, is_late))

    placements = []
    for value, view in zip(values, views, strict=True):
        start = starts[view.source] + view.offset if sources[view.source].nbytes else 0
        placements.append(_placement(value, start, view))
    lengths = tuple(end - begin for begin, end in itertools.pairwise(ends))
    return Plan(tuple(placements), tuple(sources), tuple(chunks), lengths, ends[-1]), views


def _cut(
    members: list[int],
    sources: list[Source],
    starts: list[int],
    chunks: list[Chunk],
    total: int,
    chunk_bytes: int,
    dtype: str,
    late: bool,
) -> int:
    """Lay ``members`` end to end from address ``total``, cut them into chunks, return the end."""
    pieces: list[Piece] = []
    filled = 0
    for i in members:
        starts[i] = total
        nbytes, done = sources[i].nbytes, 0
        total += nbytes
        while done < nbytes:
            take = min(nbytes - done, chunk_bytes - filled)
            pieces.append(Piece(i, done, done + take, filled))
            done += take
            filled += take
            if filled == chunk_bytes:
                chunks.append(Chunk(len(chunks), filled, dtype, late, tuple(pieces)))
                pieces, filled = [], 0
    if filled:
        chunks.append(Chunk(len(chunks), filled, dtype, late, tuple(pieces)))
    return total


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


def tensor_records(names: Sequence[str], plan: Plan) -> list[TensorRecord]:
    """Return the records of a plan's leaves, each whole and in one shard."""
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
        for name, place in zip(names, plan.placements, strict=True)
    ]
