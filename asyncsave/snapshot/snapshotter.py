"""Snapshotter: copies the bytes of one chunk from live memory into a slot.

Everything here runs in the training thread and is what a save costs it, so it is arranged around
few calls into torch per chunk: destinations are views of slots, made once and kept as long as the
plan holds, and torch's own threads do the copying without the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import StagingError
from ..format.dtypes import DTYPES
from ..state.flatten import Bulk, Flat
from ..state.plan import Chunk, Piece, Plan
from ..state.sources import Copy, Source, address
from ..state.tensors import INTEGERS, byte_alias
from ..state.values import TORCH_DTYPES
from .arena import Slot
from .fence import Event, LateCopies, Transport

_COPIED_AS_THEY_ARE = frozenset(
    dtype for name, dtype in TORCH_DTYPES.items() if name in DTYPES and DTYPES[name].exact
)


@dataclass(slots=True)
class Staged:
    """A chunk in a slot. ``event`` is the end of a copy that is still under way, or None."""

    chunk: Chunk
    slot: Slot
    event: Event | None = None
    late: LateCopies | None = None


@dataclass(slots=True)
class _Bound:
    """The views of ``slot`` that a chunk's whole leaves are copied into, and its other pieces."""

    slot: Slot
    destinations: list[torch.Tensor]
    leaves: list[int]
    rest: list[Piece]


class Snapshotter:
    """Copies chunks into slots; used by the training thread.

    Args:
        transport: how device tensors are copied; None where there is no such device.
        overlap: whether copies may end as late as the fence.
    """

    def __init__(self, transport: Transport | None, *, overlap: bool) -> None:
        self.transport = transport
        self._overlap = overlap
        self._plan: Plan | None = None
        self._bound: dict[int, _Bound] = {}

    def late(self, flat: Flat) -> list[bool]:
        """Return for every leaf whether only ``optimizer.step()`` changes it, as far as is known.

        True for parameters and optimizer state of the live modules and optimizers in the state,
        on a device that copies asynchronously. Their buffers change in the forward pass already.
        """
        if self.transport is None or not self._overlap:
            return [False] * len(flat.values)
        owned = {tensor.data_ptr() for each in flat.objects for tensor in _stepped(each)}
        return [
            isinstance(value, torch.Tensor)
            and self.transport.owns(value)
            and not value.is_inference()  # it has no version to compare
            and value.data_ptr() in owned
            for value in flat.values
        ]

    def on_device(self, flat: Flat) -> bool:
        """Whether any leaf is copied from a device that copies faster into pinned slots."""
        transport = self.transport
        return (
            transport is not None
            and transport.pinned
            and any(
                isinstance(value, torch.Tensor) and transport.owns(value) for value in flat.values
            )
        )

    def forget(self) -> None:
        """Let go of the views of slots that will not be used again."""
        self._plan, self._bound = None, {}

    def stage(
        self, flat: Flat, plan: Plan, chunk: Chunk, slot: Slot, late: LateCopies | None
    ) -> Staged:
        """Copy ``chunk`` into ``slot``: complete on return, unless the result has an event.

        Raises:
            StagingError: torch could not copy (a device error, say).
        """
        if plan is not self._plan:
            self._plan, self._bound = plan, {}
        try:
            # views of slots outlive the caller's inference mode, and must not be bound to it
            with torch.inference_mode(False), torch.no_grad():
                return self._stage(flat, plan, chunk, slot, late)
        except (RuntimeError, ValueError, MemoryError) as cause:
            names = ", ".join(flat.names[plan.sources[p.source].leaf] for p in chunk.pieces[:3])
            raise StagingError(f"could not copy {names} … out of live memory: {cause}") from cause

    def _stage(
        self, flat: Flat, plan: Plan, chunk: Chunk, slot: Slot, late: LateCopies | None
    ) -> Staged:
        bound = self._bound.get(chunk.index)
        if bound is None or bound.slot is not slot:
            bound = self._bound[chunk.index] = _bind(flat, plan, chunk, slot)
        values = flat.values
        destinations = list(bound.destinations)
        sources: list[Any] = [values[leaf] for leaf in bound.leaves]
        for piece in bound.rest:
            for destination, source in _pairs(values, plan.sources[piece.source], piece, slot):
                destinations.append(destination)
                sources.append(source)
        first = values[plan.sources[chunk.pieces[0].source].leaf]
        transport = self.transport
        if transport is None or not isinstance(first, torch.Tensor) or not transport.owns(first):
            if destinations:
                # one call for all: 20,000 tensors of 1 KiB take 20 ms, by copy_() of each 29
                torch._foreach_copy_(destinations, sources)
            return Staged(chunk, slot)
        event = transport.copy(list(zip(destinations, sources, strict=True)))
        if late is None or not chunk.late:
            return Staged(chunk, slot, event)
        late.add(chunk.index, _guards(flat, plan, chunk), event)
        return Staged(chunk, slot, event, late)


def _stepped(each: Any) -> Iterator[torch.Tensor]:
    if isinstance(each, torch.nn.Module):
        yield from each.parameters()
    elif isinstance(each, torch.optim.Optimizer):
        for state in each.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield value


def _guards(flat: Flat, plan: Plan, chunk: Chunk) -> list[tuple[str, torch.Tensor, int]]:
    guards = []
    for piece in chunk.pieces:
        leaf = plan.sources[piece.source].leaf
        value = flat.values[leaf]
        assert isinstance(value, torch.Tensor)
        # detached: it shares the version, and keeps the memory even if `value.data = …` lets it go
        guards.append((flat.names[leaf], value.detach(), value._version))
    return guards


def _bind(flat: Flat, plan: Plan, chunk: Chunk, slot: Slot) -> _Bound:
    """Make the views of ``slot`` that whole tensors are copied into; return what is left over."""
    destinations: list[torch.Tensor] = []
    leaves: list[int] = []
    rest: list[Piece] = []
    elements = None  # those of a chunk are of one dtype
    for piece in chunk.pieces:
        source = plan.sources[piece.source]
        value = flat.values[source.leaf]
        if (
            source.whole
            and piece.stop - piece.start == source.nbytes
            and isinstance(value, torch.Tensor)
            and value.dtype in _COPIED_AS_THEY_ARE
        ):
            # one call instead of a slice and two views; a slot is at the start of its storage
            elements = slot.tensor.view(value.dtype) if elements is None else elements
            offset = piece.offset // value.element_size()
            destinations.append(elements.as_strided(value.shape, value.stride(), offset))
            leaves.append(source.leaf)
        else:
            rest.append(piece)
    return _Bound(slot, destinations, leaves, rest)


def _pairs(
    values: list[Bulk], source: Source, piece: Piece, slot: Slot
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the copies that bring one piece into a slot."""
    value = values[source.leaf]
    run = slot.tensor[piece.offset : piece.offset + piece.stop - piece.start]
    if source.copy is Copy.RANGE:
        yield run, _memory(value, source.offset + piece.start, piece.stop - piece.start)
    elif not isinstance(value, torch.Tensor):
        # NumPy itself: torch would warn about arrays that are read-only
        _copy_bytes(value, piece.start, piece.stop, run.numpy())
    else:
        # a pending conjugation or negation is carried out by copy_, which needs the real dtype
        if value.dtype not in _COPIED_AS_THEY_ARE and not (value.is_conj() or value.is_neg()):
            value = value.view(INTEGERS[value.element_size()])
        width, done = value.element_size(), 0
        for box in _boxes(value, piece.start // width, piece.stop // width):
            nbytes = box.numel() * width
            yield run[done : done + nbytes].view(box.dtype).view(box.shape), box
            done += nbytes


def _memory(value: Bulk, offset: int, nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of memory from ``offset`` bytes behind the first element of a leaf."""
    if isinstance(value, torch.Tensor):
        first = int(value.storage_offset()) * value.element_size() + offset
        if not value.is_cpu or (0 <= first <= value.untyped_storage().nbytes() - nbytes):
            return byte_alias(value, first, nbytes)
    # other storages, or arrays, reach further: the leaves in the range are all of it, see sources
    data = (address(value) + offset, False)
    raw = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": data}
    return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=raw)))


def _copy_bytes(
    value: np.ndarray[Any, Any] | bytes, start: int, stop: int, out: np.ndarray[Any, Any]
) -> None:
    """Copy the bytes ``start`` to ``stop`` of a value, elements in row-major order."""
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    if value.flags.c_contiguous:
        out[:] = value.reshape(-1).view(np.uint8)[start:stop]
        return
    width, at = value.itemsize, start
    while at < stop:
        first, done = divmod(at, width)
        if done or stop - at < width:  # chunks may cut elements whose width is no power of two
            element = np.empty(width, np.uint8)
            _copy_elements(value, first, first + 1, element)
            take = min(width - done, stop - at)
            out[at - start :][:take] = element[done : done + take]
        else:
            take = (stop - at) // width * width
            _copy_elements(value, first, first + take // width, out[at - start :][:take])
        at += take


def _copy_elements(
    value: np.ndarray[Any, Any], first: int, stop: int, out: np.ndarray[Any, Any]
) -> None:
    done = 0
    for box in _boxes(value, first, stop):
        out[done : done + box.nbytes].view(value.dtype).reshape(box.shape)[...] = box
        done += box.nbytes


_Box = TypeVar("_Box", torch.Tensor, np.ndarray[Any, Any])


def _boxes(value: _Box, first: int, stop: int) -> Iterator[_Box]:
    """Yield views that together are the elements ``first`` to ``stop`` in row-major order."""
    if not value.shape:
        yield value
        return
    if len(value.shape) == 1:
        yield value[first:stop]
        return
    row = math.prod(value.shape[1:])
    top, bottom = first // row, stop // row
    if top == bottom:
        yield from _boxes(value[top], first - top * row, stop - top * row)
        return
    if first % row:
        yield from _boxes(value[top], first - top * row, row)
        top += 1
    if bottom > top:
        yield value[top:bottom]
    if stop % row:
        yield from _boxes(value[bottom], 0, stop - bottom * row)
