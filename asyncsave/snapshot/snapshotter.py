"""Snapshotter: copies the bytes of one chunk from live memory into a slot.

All but the last `forget` runs in the training thread and is what a save costs it, so it is arranged
around few calls into torch per chunk: destinations are views of slots, made once and kept as long
as the plan holds, and torch's own threads do the copying without the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StagingError
from ..state.chunks import Chunk, Piece, Plan
from ..state.flatten import Flat
from ..state.tensors import COPIED_AS_THEY_ARE, copies
from .arena import Slot
from .fence import Event, LateCopies, Transport


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
    """Copies chunks into slots, in the thread that saves. At its end the background calls `forget`.

    Args:
        transport: how device tensors are copied; None where there is no such device.
    """

    def __init__(self, transport: Transport | None) -> None:
        self.transport = transport
        self._plan: Plan | None = None
        self._bound: dict[int, _Bound] = {}

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
            names = ", ".join(
                flat.names[plan.layout.sources[p.source].leaf] for p in chunk.pieces[:3]
            )
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
            source = plan.layout.sources[piece.source]
            into = slot.tensor[piece.offset :][: piece.stop - piece.start]
            for destination, tensor in copies(values[source.leaf], source, piece.start, into):
                destinations.append(destination)
                sources.append(tensor)
        first = values[plan.layout.sources[chunk.pieces[0].source].leaf]
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


def _guards(flat: Flat, plan: Plan, chunk: Chunk) -> list[tuple[str, torch.Tensor, int]]:
    guards = []
    for piece in chunk.pieces:
        leaf = plan.layout.sources[piece.source].leaf
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
        source = plan.layout.sources[piece.source]
        value = flat.values[source.leaf]
        if (
            source.whole
            and piece.stop - piece.start == source.nbytes
            and isinstance(value, torch.Tensor)
            and value.dtype in COPIED_AS_THEY_ARE
        ):
            # one call instead of a slice and two views; a slot is at the start of its storage
            elements = slot.tensor.view(value.dtype) if elements is None else elements
            offset = piece.offset // value.element_size()
            destinations.append(elements.as_strided(value.shape, value.stride(), offset))
            leaves.append(source.leaf)
        else:
            rest.append(piece)
    return _Bound(slot, destinations, leaves, rest)
