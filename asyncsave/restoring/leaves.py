"""Leaves: values with bulk out of a checkpoint. New ones, or into live ones.

`NewLeaves` are new tensors: leaves whose addresses overlap become views of one new storage, so
ties come back as ties. `fill_runs` aims reads at live tensors' own memory where a tensor is all
that lies between its first byte and its last one; elsewhere (another layout, gaps with other
values, a device, another dtype) at memory on the way there, from which `put` copies the elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import LoadError
from ..format.manifest import TensorRecord, extent_bytes
from ..format.tree import numpy_dtype
from ..pages import Bytes
from ..reading.checkpoint import Run
from ..reading.groups import Group, grouped
from ..state.tensors import INTEGERS, byte_alias
from ..state.values import TORCH_DTYPES, torch_dtype
from .live import Bulk, Fill, extent


class NewLeaves:
    """New memory for leaves; those that overlap share it, as they did when they were saved.

    Attributes:
        runs: what is to be read before there are `values`.

    Raises:
        UnsupportedVersionError: a leaf is of a dtype that this torch does not have.
    """

    def __init__(self, tensors: Sequence[TensorRecord], indices: Sequence[int]) -> None:
        for record in (tensors[i] for i in indices):
            if record.kind == "torch" and record.dtype not in TORCH_DTYPES:
                torch_dtype(record.dtype, repr(record.name))  # refused before a byte is read
        self._tensors = tensors
        self._blocks = _together(tensors, [Block(each) for each in grouped(tensors, indices)])
        self.runs: list[Run] = []
        with torch.inference_mode(False):  # else what is loaded could never be trained
            for block in self._blocks:
                self.runs.append(Run(block.start, block.stop - block.start, block.array()))

    @property
    def nbytes(self) -> int:
        """Bytes of all their memory."""
        return sum(run.stop - run.start for run in self.runs)

    def values(self, device: torch.device) -> dict[int, Any]:
        """Return the leaves, by index, once the runs are filled; torch's on ``device``."""
        made: dict[int, Any] = {}
        with torch.inference_mode(False):
            for block in self._blocks:
                if block.apart:
                    made.update(block.copies(self._tensors, device))
                    continue
                host, moved = block.memory, None
                for i in block.members:
                    if device.type != "cpu" and self._tensors[i].kind == "torch":
                        moved = block.memory = host.to(device) if moved is None else moved
                    else:  # an array: it loses its ties to tensors that are on a device
                        block.memory = host
                    made[i] = block.value(self._tensors[i])
        return made


_SMALL_BYTES = 4 << 10
_TOGETHER_BYTES = 4 << 20


def _together(tensors: Sequence[TensorRecord], blocks: list[Block]) -> list[Block]:
    """Return the blocks, with neighbours that are small tensors in one, as each costs time.

    Measured, 300,000 tensors of one element: 67 µs of CPU time for each, and 39 together.
    """
    result: list[Block] = []
    for block in blocks:
        record = tensors[block.members[0]]
        last = result[-1] if result else None
        small = len(block.members) == 1 and 0 < block.stop - block.start <= _SMALL_BYTES
        if not small or record.kind != "torch" or record.shards[0].strides is not None:
            result.append(block)
        elif last is None or not last.apart or last.stop != block.start or last.is_full:
            block.apart = True
            result.append(block)
        else:
            last.stop = block.stop
            last.members += block.members
    return result


class Block:
    """Memory for addresses that were one piece of memory when they were saved.

    Or, if ``apart``, for leaves side by side that shared none and are to have their own.
    """

    __slots__ = ("_bytes", "_pad", "apart", "members", "memory", "start", "stop")

    def __init__(self, group: Group) -> None:
        self.start, self.stop = group.start, group.stop
        self.members = list(group.members)
        self.memory = _NOTHING
        self.apart = False
        self._pad = group.pad
        self._bytes: dict[int, bytes] | None = None

    def array(self) -> Bytes:
        """Take the memory."""
        self.memory = _memory(self.stop - self.start + self._pad)
        return self.memory.numpy()[self._pad :] if self._pad else self.memory.numpy()

    @property
    def is_full(self) -> bool:
        """Whether it is long enough."""
        return self.stop - self.start >= _TOGETHER_BYTES

    def copies(
        self, tensors: Sequence[TensorRecord], device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the leaves, each in memory of its own, and give this one back."""
        lengths = [extent_bytes(tensors[i]) for i in self.members]
        for i, piece in zip(self.members, self.memory.split(lengths), strict=True):
            record = tensors[i]
            own = (
                piece.clone().view(torch_dtype(record.dtype, repr(record.name))).view(record.shape)
            )
            yield i, _marked(own.to(device), record)
        self.memory = _NOTHING

    def value(self, record: TensorRecord) -> Any:
        """Return the leaf of a record, sharing this memory."""
        offset = self._pad + record.shards[0].start - self.start
        if record.kind == "torch":
            return _tensor(self.memory, offset, record)
        raw = self.memory.numpy()[offset : offset + extent_bytes(record)]
        if record.kind == "bytes":
            # bytes with the same start are the same, and one object suffices
            if self._bytes is None:
                self._bytes = {}
            if offset not in self._bytes:
                self._bytes[offset] = raw.tobytes()
            return self._bytes[offset]
        if raw.size == 0:
            return np.empty(record.shape, numpy_dtype(record.dtype))
        return raw.view(numpy_dtype(record.dtype)).reshape(record.shape)


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _memory(nbytes: int) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except RuntimeError as cause:
        raise LoadError(f"there is no memory for a tensor of {nbytes} bytes: {cause}") from cause


def _tensor(memory: torch.Tensor, offset: int, record: TensorRecord) -> torch.Tensor:
    dtype: torch.dtype = TORCH_DTYPES[record.dtype]
    if 0 in record.shape:
        tensor = torch.empty(record.shape, dtype=dtype, device=memory.device)
    else:
        strides = record.shards[0].strides or _row_major(record.shape)
        tensor = torch.empty(0, dtype=dtype, device=memory.device)
        tensor.set_(
            memory.untyped_storage(), offset // tensor.element_size(), record.shape, strides
        )
    return _marked(tensor, record)


def _marked(tensor: torch.Tensor, record: TensorRecord) -> torch.Tensor:
    if record.parameter:
        return torch.nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.requires_grad_() if record.requires_grad else tensor


def _row_major(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]


# -- into live memory -----------------------------------------------------------------------------


def fill_runs(tensors: Sequence[TensorRecord], fills: Sequence[Fill]) -> list[Run]:
    """Return the runs that fill live tensors and arrays, whose elements are nobody else's."""
    runs, rest = _small_runs(tensors, fills)
    detours: dict[int, list[Fill]] = {}
    for fill in rest:
        record = tensors[fill.index]
        memory = _own_memory(record, fill)
        if memory is None:
            detours.setdefault(fill.index, []).append(fill)
        else:
            runs.append(Run(record.shards[0].start, memory.nbytes, memory))
    # what overlaps is read once: a hundred columns of one tensor would be a hundred of it
    for block in map(Block, grouped(tensors, detours)):
        members = [fill for i in block.members for fill in detours[i]]
        runs.append(_detour(tensors, block, members))
    return runs


_MOVED = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64})
"""Of these, ``copy_`` of one into the same keeps every bit; others are seldom small and many."""


def _small_runs(
    tensors: Sequence[TensorRecord], fills: Sequence[Fill]
) -> tuple[list[Run], list[Fill]]:
    """Return runs for small tensors side by side, each for many, and the fills that are left."""
    small: list[Fill] = []
    rest: list[Fill] = []
    for fill in fills:
        into = fill.into
        is_small = (
            isinstance(into, torch.Tensor)
            and into.dtype in _MOVED
            and 0 < into.nbytes <= _SMALL_BYTES
            and not fill.cast
            and tensors[fill.index].shards[0].strides is None
            and into.is_contiguous()
            and into.is_cpu
            and not into.is_neg()
            and not into.is_inference()
        )
        (small if is_small else rest).append(fill)
    small.sort(key=lambda fill: tensors[fill.index].shards[0].start)
    groups: list[list[Fill]] = []
    start = stop = 0
    dtype = None
    for fill in small:
        assert isinstance(fill.into, torch.Tensor)
        begin = tensors[fill.index].shards[0].start
        if fill.into.dtype != dtype or begin != stop or stop - start >= _TOGETHER_BYTES:
            groups.append([])
            start, dtype = begin, fill.into.dtype
        groups[-1].append(fill)
        stop = begin + fill.into.nbytes
    runs = []
    for group in groups:
        if len(group) < 4:
            rest += group
        else:
            runs.append(_small_run(tensors[group[0].index].shards[0].start, group))
    return runs, rest


def _small_run(start: int, fills: list[Fill]) -> Run:
    live: list[Any] = [fill.into for fill in fills]
    block = Block(Group(start, start + sum(into.nbytes for into in live), 0, ()))

    def finish() -> None:
        pieces = block.memory.view(live[0].dtype).split([into.numel() for into in live])
        new = [piece.view(into.shape) for into, piece in zip(live, pieces, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(live, new)
        block.memory = _NOTHING

    return Run(block.start, block.stop - block.start, block.array, finish)


def _own_memory(record: TensorRecord, fill: Fill) -> Bytes | None:
    """Return the memory of a live value, if the stored bytes in their order are all of it."""
    into, strides = fill.into, record.shards[0].strides
    if fill.cast:
        return None
    if isinstance(into, np.ndarray):
        return into.reshape(-1).view(np.uint8) if into.flags.c_contiguous and into.size else None
    if not into.is_cpu or into.is_conj() or into.is_neg():
        return None
    if strides is None:
        if not into.is_contiguous():
            return None
    elif list(into.stride()) != strides or extent(into.shape, into.stride()) != into.numel():
        return None
    nbytes = into.numel() * into.element_size()
    if not nbytes:
        return None
    offset = int(into.storage_offset()) * into.element_size()
    return byte_alias(into, offset, nbytes).numpy()


def _detour(tensors: Sequence[TensorRecord], block: Block, fills: Sequence[Fill]) -> Run:
    """Return a run that fills memory of its own, and then puts it where it belongs."""

    def finish() -> None:
        for fill in fills:
            put(fill, block.value(tensors[fill.index]))
        block.memory = _NOTHING

    return Run(block.start, block.stop - block.start, block.array, finish)


def put(fill: Fill, new: Any) -> None:
    """Copy a value that a live tensor or array can hold into it, and into nothing beside it."""
    into = fill.into
    if isinstance(into, np.ndarray):
        with np.errstate(over="ignore"):  # a cast to a narrower dtype may end at infinity
            into[...] = new
        return
    # an inference tensor can be changed in this mode only, and no other kind should be
    with torch.no_grad(), torch.inference_mode(into.is_inference()):
        if fill.index < 0:
            into.fill_(new)
            return
        new = new.detach()
        integers = INTEGERS.get(into.element_size())
        if integers is None or fill.cast or into.is_conj() or into.is_neg():
            into.copy_(new)
        else:
            into.view(integers).copy_(new.view(integers))


def plain_bytes(fill: Fill, new: Any) -> Any:
    """Return what ``put`` would write: of each element the bytes, as a last dimension."""
    into: Bulk = fill.into
    if isinstance(into, np.ndarray):
        there: Any = np.empty(into.shape, into.dtype)
        put(Fill(fill.name, there, fill.index, cast=fill.cast), new)
        return there.reshape(-1).view(np.uint8).reshape(*into.shape, into.itemsize)
    with torch.inference_mode(False):
        held = torch.empty(into.shape, dtype=into.dtype, device="cpu")
        put(Fill(fill.name, held, fill.index, cast=fill.cast), new)
        if into.is_conj():
            held = held.conj().resolve_conj()
        if into.is_neg():
            held = held.neg()
        flat = byte_alias(held, 0, held.numel() * held.element_size()).numpy()
        return flat.reshape(*into.shape, into.element_size())
