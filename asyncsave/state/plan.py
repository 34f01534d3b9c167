"""Plans: where the bytes of every leaf go. Leaves to chunks.

All bulk of a state is laid end to end in one *address space* of bytes, cut into *chunks*:

    leaf a        leaf b             c  d  e  (leaves of one element type side by side)
    ├────────────┼──────────────────┼──┼──┼─┤
    ├─ chunk 0 ──────┼─ chunk 1 ─────┼─ 2 ──┤   each at most chunk_bytes long

so a chunk is a slice of one large tensor, or many small tensors, or both, and nothing is wasted:
20,000 small tensors are as many chunks as their bytes need. A chunk holds one element type, because
coding depends on it, and one kind of staging.

Leaves that share memory are found by their address ranges: ranges of one storage that overlap
become one *source*, saved once, and the leaves are views into it. A reader sees ties in the same
way, as leaves whose addresses overlap. A view that does not cover its own range (``x[:, ::2]``) is
saved as its elements alone unless it is tied to something.

Plans hold no tensors. A plan is valid as long as the signature of the leaves is the same, so the
second save of the same training state costs one comparison. Pure: no threads, no files, no clock.

What there is one of for every leaf is a Struct that the garbage collector does not track, and the
comparison keeps no objects: 20,000 leaves of either kind set off full collections, which made 0.12
of the 0.19 s that a save then blocked (now 0.06).
"""

from __future__ import annotations

import collections
import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from ..dtypes import BY_NUMPY_NAME, DTYPES
from .nodes import TORCH_DTYPES
from .tree import Bulk, Flat

ALIGNMENT = 16
"""Every chunk length is cut at a multiple of this, the largest element size of torch, in bytes."""


class Copy(enum.Enum):
    """How a source's bytes are read."""

    RANGE = enum.auto()  # one run of memory
    GATHER = enum.auto()  # a strided tensor, element by element in row-major order
    BYTES = enum.auto()  # a NumPy array or bytes


class Source(msgspec.Struct, frozen=True, gc=False):
    """One run of the address space that is read from one place.

    Attributes:
        leaf: the number of a leaf through which the memory is reached.
        copy: how.
        whole: the source is exactly this leaf, and contiguous.
        offset: for a RANGE that is not whole, where it begins in the leaf's storage, in bytes.
        nbytes: its length.
    """

    leaf: int
    copy: Copy
    whole: bool
    offset: int
    nbytes: int


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
        self._storages: list[int] = []

    def plan(self, flat: Flat, chunk_bytes: int, late: Sequence[bool]) -> Plan:
        """Return the plan for these leaves: the last one, where it still holds.

        Args:
            flat: the state taken apart.
            chunk_bytes: longest chunk, a multiple of ALIGNMENT.
            late: for every leaf, whether its copy may be made until the fence.
        """
        values: list[Any] = flat.values
        fixed = (chunk_bytes, list(late))
        same = fixed == self._fixed and len(values) == len(self._forms)
        places = []
        for i, value in enumerate(values):  # once: with many tensors, each is in no cache
            same = same and _form(value) == self._forms[i]
            places.append(value.data_ptr() if type(value) in _TENSORS else id(value))
        if not same or (places != self._places and not self._still_untied(values, places)):
            self._plan = _make_plan(flat.names, values, chunk_bytes, late)
            shared: dict[Any, Any] = {}
            self._fixed = fixed
            self._forms = [shared.setdefault(form, form) for form in map(_form, values)]
            self._storages = [_storage(value) for value in values]
        self._places = places
        assert self._plan is not None
        return self._plan

    def _still_untied(self, values: Sequence[Bulk], places: list[int]) -> bool:
        """Whether every leaf that moved was alone in its storage, and is so where it is now."""
        assert self._plan is not None
        moved = [
            i for i, pair in enumerate(zip(places, self._places, strict=True)) if pair[0] != pair[1]
        ]
        before = collections.Counter(self._storages)
        alone = {source.leaf for source in self._plan.sources if source.whole}
        if any(before[self._storages[i]] != 1 or i not in alone for i in moved):
            return False
        for i in moved:
            self._storages[i] = _storage(values[i])
        after = collections.Counter(self._storages)
        return all(after[self._storages[i]] == 1 for i in moved)


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
        return (value.shape, value.dtype)
    return len(value)


def _storage(value: Bulk) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr() if value.numel() else -id(value)
    return -id(value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: ``float32``."""
    return str(dtype).removeprefix("torch.")


class _View(msgspec.Struct, gc=False):
    """A leaf's footprint in memory while sources are being found."""

    leaf: int
    low: int  # byte addresses, or offsets from an invented base for arrays
    high: int
    itemsize: int
    dtype: str
    strides: tuple[int, ...] | None
    source: int = -1
    offset: int = 0


def _make_plan(
    names: Sequence[str], values: Sequence[Bulk], chunk_bytes: int, late: Sequence[bool]
) -> Plan:
    sources: list[Source] = []
    keys: list[tuple[str, str, bool]] = []  # per source: device, coding dtype, late
    views = _find_sources(values, late, sources, keys)

    starts = [0] * len(sources)
    chunks: list[Chunk] = []
    ends = [0]
    groups: dict[tuple[str, str, bool], list[int]] = {}
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
    return Plan(tuple(placements), tuple(sources), tuple(chunks), lengths, ends[-1])


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


def _find_sources(
    values: Sequence[Bulk],
    late: Sequence[bool],
    sources: list[Source],
    keys: list[tuple[str, str, bool]],
) -> list[_View]:
    """Fill ``sources`` and ``keys``; return for every leaf which source it is in, and where."""
    views: list[_View] = []
    by_storage: dict[tuple[torch.device, int], list[_View]] = {}
    seen_arrays: dict[int, _View] = {}
    for leaf, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            view = seen_arrays.get(id(value))
            if view is None:
                view = seen_arrays[id(value)] = _add_bytes(leaf, value, sources, keys)
            views.append(view)
            continue
        view = _view(leaf, value)
        views.append(view)
        if value.numel() == 0 or value.is_conj() or value.is_neg():
            _add(view, value, Copy.GATHER, sources, keys, late[leaf])
        else:
            base = value.untyped_storage().data_ptr()
            by_storage.setdefault((value.device, base), []).append(view)
    for (_, base), members in by_storage.items():
        members.sort(key=lambda view: (view.low, -view.high))
        cluster = [members[0]]
        high = members[0].high
        for view in members[1:]:
            if view.low < high:
                cluster.append(view)
                high = max(high, view.high)
            else:
                _add_cluster(cluster, base, high, values, late, sources, keys)
                cluster, high = [view], view.high
        _add_cluster(cluster, base, high, values, late, sources, keys)
    return views


def _view(leaf: int, value: torch.Tensor) -> _View:
    low = value.data_ptr()
    extent, strides = value.numel(), None
    if extent and not value.is_contiguous():
        strides = tuple(value.stride())
        steps = zip(value.shape, strides, strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
    itemsize = value.element_size()
    return _View(leaf, low, low + extent * itemsize, itemsize, dtype_name(value.dtype), strides)


def _add(
    view: _View,
    value: torch.Tensor,
    copy: Copy,
    sources: list[Source],
    keys: list[tuple[str, str, bool]],
    late: bool,
) -> None:
    """Make a source of one leaf's elements in row-major order."""
    view.strides = None
    view.source = len(sources)
    whole = copy is Copy.RANGE
    sources.append(Source(view.leaf, copy, whole, 0, value.numel() * view.itemsize))
    keys.append((str(value.device), view.dtype, late))


def _add_cluster(
    cluster: list[_View],
    base: int,
    high: int,
    values: Sequence[Bulk],
    late: Sequence[bool],
    sources: list[Source],
    keys: list[tuple[str, str, bool]],
) -> None:
    """Make one source of leaves whose address ranges overlap."""
    first = cluster[0]
    value = values[first.leaf]
    assert isinstance(value, torch.Tensor)
    is_late = all(late[view.leaf] for view in cluster)
    same = len(cluster) == 1 or all(
        (view.low, view.strides, view.dtype) == (first.low, first.strides, first.dtype)
        and _shape(values[view.leaf]) == value.shape
        for view in cluster
    )
    sparse = high - first.low > value.numel() * first.itemsize
    if same and (first.strides is None or sparse):
        copy = Copy.RANGE if first.strides is None else Copy.GATHER
        _add(first, value, copy, sources, keys, is_late)
        for view in cluster:
            view.source, view.strides = first.source, None
        return
    low = first.low
    dtype = first.dtype if len({view.dtype for view in cluster}) == 1 else "uint8"
    largest = max(cluster, key=lambda view: _storage_bytes(values[view.leaf]))
    for view in cluster:
        view.source, view.offset = len(sources), view.low - low
    sources.append(Source(largest.leaf, Copy.RANGE, False, low - base, high - low))
    keys.append((str(value.device), dtype, is_late))


def _shape(value: Bulk) -> Any:
    assert isinstance(value, torch.Tensor)
    return value.shape


def _storage_bytes(value: Bulk) -> int:
    assert isinstance(value, torch.Tensor)
    return value.untyped_storage().nbytes()


def _add_bytes(
    leaf: int, value: Bulk, sources: list[Source], keys: list[tuple[str, str, bool]]
) -> _View:
    dtype = "uint8"
    if isinstance(value, np.ndarray):
        dtype = BY_NUMPY_NAME.get(value.dtype.str, dtype)
    nbytes = value.nbytes if isinstance(value, np.ndarray) else len(value)
    sources.append(Source(leaf, Copy.BYTES, True, 0, nbytes))
    keys.append(("cpu", dtype, False))
    return _View(leaf, 0, nbytes, 1, dtype, None, source=len(sources) - 1)


def _placement(value: Bulk, start: int, view: _View) -> Placement:
    if isinstance(value, torch.Tensor):
        return Placement(
            "torch",
            view.dtype,
            tuple(value.shape),
            start,
            view.strides,
            value.requires_grad,
            type(value) is torch.nn.Parameter,
        )
    if isinstance(value, np.ndarray):
        return Placement("numpy", value.dtype.str, value.shape, start, None, False, False)
    return Placement("bytes", "uint8", (len(value),), start, None, False, False)
