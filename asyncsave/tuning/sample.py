"""Sample: some chunks of a state, from all over it, for measuring what coding them brings.

They come in an order in which every beginning is spread over the state as all of it is. So a
shorter sample of the same state is a beginning of a longer one.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..errors import StateError
from ..format.dtypes import BY_NUMPY_NAME
from ..format.leaf import Leaf
from ..pipeline.budget import CHUNK_BYTES
from ..reading.checkpoint import Checkpoint
from ..reading.fill import Fill
from ..reading.newest import first_sound
from ..snapshot.arena import Slot
from ..snapshot.snapshotter import Snapshotter
from ..state.chunks import Plan
from ..state.flatten import flatten
from ..state.layout import Layouts
from ..state.values import torch_dtype
from ..storage.place import Place


class _Piece(Protocol):
    @property
    def nbytes(self) -> int: ...


_P = TypeVar("_P", bound=_Piece)


@dataclass(frozen=True, slots=True)
class Sample:
    """Chunks of a state, each a tensor of its own; and how long the whole state is."""

    values: list[torch.Tensor]
    state_bytes: int

    def first(self, nbytes: float, fewest: int) -> list[torch.Tensor]:
        """Return as many as ``nbytes`` allow; ``fewest`` at least, and as long as ``fewest`` of
        the longest, since what a short one takes says little.
        """
        least = fewest * max((value.nbytes for value in self.values), default=0)
        count, total = 0, 0
        for value in self.values:
            if count >= fewest and total >= least and total + value.nbytes > nbytes:
                break
            total += value.nbytes
            count += 1
        return self.values[:count]


def _spread(pieces: Sequence[_P], most_bytes: int) -> list[_P]:
    """Return pieces from all over, ``most_bytes`` at most, in the order that is promised.

    Multiples of the golden ratio, modulo 1, fill the unit interval evenly. They are taken as places
    in the state, each standing for the piece that is there, so that short pieces come late.
    """
    if not pieces:
        raise StateError("the state has no tensors, arrays or long bytes: there is nothing to tune")
    ends = list(itertools.accumulate(piece.nbytes for piece in pieces))
    golden = (5**0.5 - 1) / 2
    places = (bisect.bisect(ends, i * golden % 1 * ends[-1]) for i in range(8 * len(pieces)))
    order = dict.fromkeys([*places, *range(len(pieces))])
    chosen: list[_P] = []
    total = 0
    for i in order:
        total += pieces[i].nbytes
        if chosen and total > most_bytes:
            break
        chosen.append(pieces[i])
    return chosen


def sample_of_state(state: Any, most_bytes: int) -> Sample:
    """Copy chunks of a live state, as they would be saved; StateError if it cannot be."""
    flat = flatten(state)
    layout = Layouts().of(flat)
    plan = Plan.cut(layout, CHUNK_BYTES)
    snapshotter = Snapshotter(None)
    values: list[torch.Tensor] = []
    for chunk in _spread([chunk for chunk in plan.chunks if chunk.nbytes], most_bytes):
        with torch.inference_mode(False):
            memory = torch.empty(chunk.nbytes, dtype=torch.uint8, device="cpu")
        snapshotter.stage(flat, plan, chunk, Slot(len(values), memory), None)
        values.append(memory.view(torch_dtype(chunk.dtype, "a chunk")))
    return Sample(values, layout.nbytes)


@dataclass(slots=True)
class _Extent:
    """Addresses of one rank that have elements of one type."""

    dtype: torch.dtype
    rank: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def is_followed_by(self, other: _Extent) -> bool:
        """Whether another one goes on where this one ends."""
        return (self.dtype, self.rank, self.stop) == (other.dtype, other.rank, other.start)

    def cut(self) -> list[_Extent]:
        """Return it in pieces as long as chunks, of whole elements."""
        starts = range(self.start, self.stop, CHUNK_BYTES)
        pieces = [
            _Extent(self.dtype, self.rank, at, min(at + CHUNK_BYTES, self.stop)) for at in starts
        ]
        for piece in pieces:
            piece.stop -= piece.nbytes % self.dtype.itemsize
        return [piece for piece in pieces if piece.nbytes]


def sample_of_checkpoint(place: Place, most_bytes: int) -> Sample:
    """Read chunks of the checkpoint at ``place``, or of the one that `restore` would take there.

    Raises:
        CheckpointNotFoundError, FormatError, IntegrityError: there is none.
    """

    def use(checkpoint: Checkpoint) -> Sample:
        pieces = [piece for extent in _extents(checkpoint.leaves) for piece in extent.cut()]
        chosen = _spread(pieces, most_bytes)
        memory = [torch.empty(piece.nbytes, dtype=torch.uint8, device="cpu") for piece in chosen]
        pairs = list(zip(chosen, memory, strict=True))
        checkpoint.read(
            [Fill(at.start, at.nbytes, into.numpy(), rank=at.rank) for at, into in pairs]
        )
        return Sample([into.view(at.dtype) for at, into in pairs], checkpoint.raw_bytes)

    return first_sound(place, use)


def _extents(leaves: Iterable[Leaf]) -> list[_Extent]:
    """Return the extents of one element type, in address order. Ties are counted once."""
    found: list[_Extent] = []
    for leaf in sorted(leaves, key=operator.attrgetter("rank", "start")):
        extent = _Extent(_dtype(leaf), leaf.rank, leaf.start, leaf.stop)
        last = found[-1] if found else None
        if last is not None and last.rank == extent.rank:
            extent.start = max(extent.start, last.stop)
        if extent.start >= extent.stop:
            continue
        if last is not None and last.is_followed_by(extent):
            last.stop = extent.stop
        else:
            found.append(extent)
    return found


def _dtype(leaf: Leaf) -> torch.dtype:
    """Return the dtype as which a leaf was coded: torch's own, or that of the same elements."""
    if leaf.kind == "torch":
        return torch_dtype(leaf.dtype.name, repr(leaf.name))
    return torch_dtype(BY_NUMPY_NAME.get(leaf.dtype.numpy, "uint8"), repr(leaf.name))
