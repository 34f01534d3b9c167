"""Sources: the runs of memory that hold the leaves, each of which is saved once.

Leaves that share memory are found by their address ranges: ranges that overlap become one source,
and the leaves are views into it, be they tensors of one storage, tensors of several that are about
the same memory, or NumPy arrays. A reader sees ties in the same way, as leaves whose addresses
overlap. A view that does not cover its own range (``x[:, ::2]``) is saved as its elements alone
unless it is tied to something.

What the format cannot say is a source of its own, and its ties are lost: a tensor that is lazily
conjugated or negated, as its elements in memory are not its values; an array that is not C
contiguous, as arrays have no strides; and a leaf that no reader could align together with those
that it overlaps. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from ..format.dtypes import BY_NUMPY_NAME
from .flatten import Bulk

Key = tuple[str, str, bool, bool]
"""Sources can be in one chunk if they have the same: device, dtype to code for, late, frozen."""

_WIDEST_BYTES = 16  # a reader aligns elements up to this width


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
        offset: for a RANGE, where it begins, in bytes from the leaf's first element. (Not from the
            beginning of its storage: another storage may have the same memory next time.)
        nbytes: its length.
        in_storage: it is on a device, and reached through the leaf's storage beyond the leaf.
    """

    leaf: int
    copy: Copy
    whole: bool
    offset: int
    nbytes: int
    in_storage: bool = False


class View(msgspec.Struct, gc=False):
    """A leaf's footprint in memory, and then its place in a source.

    ``low`` and ``high`` are addresses where the leaf can be tied to others. They are the same for a
    tensor that cannot be, and one apart for what is told from others by identity.
    """

    leaf: int
    low: int
    high: int
    itemsize: int
    dtype: str
    strides: tuple[int, ...] | None = None
    source: int = -1
    offset: int = 0


def place(value: Bulk) -> int:
    """Return where a leaf's memory is; for what is told from others by identity, a place of it."""
    if isinstance(value, torch.Tensor) or (
        isinstance(value, np.ndarray) and value.flags.c_contiguous
    ):
        return address(value)
    return id(value)


def address(value: Any) -> int:
    """Return where the first element of a tensor or an array is."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    first: int = value.__array_interface__["data"][0]
    return first


def find_sources(
    values: Sequence[Bulk], late: Sequence[bool], frozen: Sequence[bool]
) -> tuple[list[Source], list[Key], list[View]]:
    """Return the sources in the order of their first leaves, their keys, and each leaf's view."""
    views: list[View] = []
    units: list[list[View]] = []
    memories: dict[Any, list[View]] = {None: []}
    seen: dict[int, View] = {}
    for leaf, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            view = _tensor_view(leaf, value)
            if view.low == view.high:
                units.append([view])
            elif value.is_cpu:
                memories[None].append(view)
            else:
                base = value.untyped_storage().data_ptr()
                memories.setdefault((value.device, base), []).append(view)
        elif isinstance(value, np.ndarray) and value.size and value.flags.c_contiguous:
            view = _array_view(leaf, value)
            memories[None].append(view)
        elif id(value) in seen:
            view = seen[id(value)]
        else:
            view = seen[id(value)] = View(leaf, 0, 1, 1, _coded_as(value))
            units.append([view])
        views.append(view)
    for members in memories.values():
        units.extend(_clusters(members))
    units.sort(key=lambda unit: min(view.leaf for view in unit))
    sources: list[Source] = []
    keys: list[Key] = []
    for unit in units:
        source, key = _source(unit, values, late)
        for view in unit:
            view.source = len(sources)
        sources.append(source)
        keys.append((*key, all(frozen[view.leaf] for view in unit)))
    return sources, keys, views


def _tensor_view(leaf: int, value: torch.Tensor) -> View:
    dtype, itemsize = str(value.dtype).removeprefix("torch."), value.element_size()
    extent, strides = value.numel(), None
    if not extent or value.is_conj() or value.is_neg():
        return View(leaf, 0, 0, itemsize, dtype)
    if not value.is_contiguous():
        strides = tuple(value.stride())
        steps = zip(value.shape, strides, strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
    low = value.data_ptr()
    return View(leaf, low, low + extent * itemsize, itemsize, dtype, strides)


def _array_view(leaf: int, value: np.ndarray[Any, Any]) -> View:
    low = address(value)
    return View(leaf, low, low + value.nbytes, value.itemsize, _coded_as(value))


def _coded_as(value: np.ndarray[Any, Any] | bytes) -> str:
    if isinstance(value, np.ndarray):
        return BY_NUMPY_NAME.get(value.dtype.str, "uint8")
    return "uint8"


def _clusters(members: list[View]) -> list[list[View]]:
    """Return views grouped into those whose ranges overlap, and that a reader can align."""
    members.sort(key=lambda view: (view.low, -view.high))
    runs: list[list[View]] = []
    high = 0
    for view in members:
        if view.low < high:
            runs[-1].append(view)
        else:
            runs.append([view])
        high = max(high, view.high)
    clusters: list[list[View]] = []
    for run in runs:
        if len(run) == 1 or _can_be_aligned(run):
            clusters.append(run)
        else:
            clusters.extend([view] for view in run if _is_odd(view))
            clusters.extend(_clusters([view for view in run if not _is_odd(view)]))
    return clusters


def _can_be_aligned(run: list[View]) -> bool:
    """Whether there are addresses for these views, as far from each other, that all suit."""
    low = run[0].low
    return any(
        all(
            view.itemsize > _WIDEST_BYTES or (view.low - low + pad) % view.itemsize == 0
            for view in run
        )
        for pad in range(_WIDEST_BYTES)
    )


def _is_odd(view: View) -> bool:
    """Whether views of other elements cannot be aligned as they are and this one, too."""
    return view.itemsize <= _WIDEST_BYTES and bool(
        _WIDEST_BYTES % view.itemsize or view.low % view.itemsize
    )


def _source(
    unit: list[View], values: Sequence[Bulk], late: Sequence[bool]
) -> tuple[Source, tuple[str, str, bool]]:
    """Return the source of leaves whose ranges overlap, or of one; note where they are in it."""
    first = unit[0]
    value = values[first.leaf]
    is_late = all(late[view.leaf] for view in unit)
    device = str(value.device) if isinstance(value, torch.Tensor) else "cpu"
    nbytes = len(value) if isinstance(value, bytes) else value.nbytes
    if len(unit) == 1 or all(_same(view, first, values) for view in unit):
        copy = _copy(first, value, nbytes)
        if copy is not None:
            for view in unit:
                view.strides = None
            source = Source(first.leaf, copy, copy is not Copy.GATHER, 0, nbytes)
            return source, (device, first.dtype, is_late)
    source = _range(unit, values, on_device=device != "cpu")
    dtype = first.dtype if len({view.dtype for view in unit}) == 1 else "uint8"
    return source, (device, dtype, is_late)


def _range(unit: list[View], values: Sequence[Bulk], *, on_device: bool) -> Source:
    """Return the source of all the memory that leaves cover; note where they are in it."""
    low, high = unit[0].low, max(view.high for view in unit)
    through = max(unit, key=lambda view: _storage_bytes(values[view.leaf]))
    for view in unit:
        view.offset = view.low - low
    return Source(through.leaf, Copy.RANGE, False, low - through.low, high - low, on_device)


def _copy(view: View, value: Bulk, nbytes: int) -> Copy | None:
    """Return how a leaf is read that is a source by itself; None: as the range that it covers."""
    if not isinstance(value, torch.Tensor):
        return Copy.BYTES
    if view.low == view.high:
        return Copy.GATHER
    if view.strides is None:
        return Copy.RANGE
    return Copy.GATHER if view.high - view.low > nbytes else None


def _same(view: View, first: View, values: Sequence[Bulk]) -> bool:
    if (view.low, view.high, view.strides, view.dtype) != (
        *(first.low, first.high, first.strides, first.dtype),
    ):
        return False
    value, other = values[view.leaf], values[first.leaf]
    assert not isinstance(value, bytes)
    assert not isinstance(other, bytes)
    return tuple(value.shape) == tuple(other.shape)


def _storage_bytes(value: Bulk) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else -1
