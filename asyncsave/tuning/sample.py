"""Sample: some chunks of a state, from all over it, for measuring what coding them brings.

They come in an order in which every beginning is spread over the state as all of it is. So a
shorter sample of the same state is a beginning of a longer one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from ..errors import StateError
from ..format.manifest import TensorRecord, extent_bytes
from ..format.tree import numpy_dtype
from ..pipeline.budget import CHUNK_BYTES
from ..reading.checkpoint import Checkpoint, Run
from ..reading.newest import first_sound
from ..snapshot.arena import Slot
from ..snapshot.snapshotter import Snapshotter
from ..state.flatten import flatten
from ..state.plan import Planner
from ..state.values import torch_dtype
from ..storage.filesystem import FileSystem


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
    plan = Planner().plan(flat, CHUNK_BYTES, [False] * len(flat.values))
    snapshotter = Snapshotter(None, overlap=False)
    values: list[torch.Tensor] = []
    for chunk in _spread([chunk for chunk in plan.chunks if chunk.nbytes], most_bytes):
        with torch.inference_mode(False):
            memory = torch.empty(chunk.nbytes, dtype=torch.uint8, device="cpu")
        snapshotter.stage(flat, plan, chunk, Slot(len(values), memory), None)
        values.append(memory.view(torch_dtype(chunk.dtype, "a chunk")))
    return Sample(values, plan.nbytes)


@dataclass(slots=True)
class _Extent:
    """A run of the address space of one element type."""

    dtype: torch.dtype
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def cut(self) -> list[_Extent]:
        """Return it in pieces as long as chunks, of whole elements."""
        starts = range(self.start, self.stop, CHUNK_BYTES)
        pieces = [_Extent(self.dtype, at, min(at + CHUNK_BYTES, self.stop)) for at in starts]
        for piece in pieces:
            piece.stop -= piece.nbytes % self.dtype.itemsize
        return [piece for piece in pieces if piece.nbytes]


def sample_of_checkpoint(filesystem: FileSystem, path: Path, most_bytes: int) -> Sample:
    """Read chunks of the checkpoint at ``path``, or of the one that `restore` would take.

    Raises:
        CheckpointNotFoundError, FormatError, IntegrityError: there is none.
    """

    def one(checkpoint: Checkpoint) -> Sample:
        pieces = [piece for whole in _extents(checkpoint) for piece in whole.cut()]
        chosen = _spread(pieces, most_bytes)
        memory = [torch.empty(piece.nbytes, dtype=torch.uint8, device="cpu") for piece in chosen]
        pairs = list(zip(chosen, memory, strict=True))
        checkpoint.read([Run(at.start, at.nbytes, into.numpy()) for at, into in pairs])
        total = sum(chunk.raw_length for chunk in checkpoint.rank.chunks)
        return Sample([into.view(at.dtype) for at, into in pairs], total)

    return first_sound(filesystem, path, one)


def _extents(checkpoint: Checkpoint) -> list[_Extent]:
    """Return the runs of one element type, in address order. Ties are counted once."""
    found: list[_Extent] = []
    for tensor in sorted(checkpoint.rank.tensors, key=lambda tensor: tensor.shards[0].start):
        start = tensor.shards[0].start
        stop, dtype = start + extent_bytes(tensor), _dtype(tensor)
        if found:
            start = max(start, found[-1].stop)
        if start >= stop:
            continue
        if found and (found[-1].dtype, found[-1].stop) == (dtype, start):
            found[-1].stop = stop
        else:
            found.append(_Extent(dtype, start, stop))
    return found


def _dtype(tensor: TensorRecord) -> torch.dtype:
    if tensor.kind == "torch":
        return torch_dtype(tensor.dtype, repr(tensor.name))
    if tensor.kind == "numpy":
        try:
            return torch.from_numpy(np.empty(0, numpy_dtype(tensor.dtype))).dtype
        except (TypeError, ValueError):
            return torch.uint8  # as it is saved, too
    return torch.uint8
