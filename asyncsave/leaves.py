"""Leaves: values with bulk out of a checkpoint. New ones, or into live ones.

`NewLeaves` are new tensors: leaves whose addresses overlap become views of one new storage, so
ties come back as ties. `fill_run` aims a read at a live tensor's own memory, or, where that has
another layout or is on a device, at memory on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import FormatError, LoadError
from .snapshot.arena import Bytes
from .snapshot.snapshotter import INTEGERS, byte_alias
from .state.nodes import numpy_dtype
from .storage.manifest import TensorRecord, extent_bytes, item_bytes
from .storage.reader import Run


class NewLeaves:
    """New memory for leaves; those that overlap share it, as they did when they were saved.

    Attributes:
        runs: what is to be read before there are `values`.
    """

    def __init__(self, tensors: Sequence[TensorRecord], indices: Sequence[int]) -> None:
        self._tensors = tensors
        self._blocks = blocks = list[Block]()
        empty = [i for i in indices if not extent_bytes(tensors[i])]
        full = [i for i in indices if extent_bytes(tensors[i])]
        for i in sorted(full, key=lambda i: tensors[i].shards[0].start):
            start = tensors[i].shards[0].start
            stop = start + extent_bytes(tensors[i])
            if not blocks or start >= blocks[-1].stop:
                blocks.append(Block(start, stop))
            blocks[-1].stop = max(blocks[-1].stop, stop)
            blocks[-1].members.append(i)
        for i in empty:
            blocks.append(Block(0, 0))
            blocks[-1].members.append(i)
        self.runs: list[Run] = []
        for block in blocks:
            block.allocate(tensors)
            self.runs.append(Run(block.start, block.stop - block.start, block.array()))

    @property
    def nbytes(self) -> int:
        """Bytes of all their memory."""
        return sum(run.stop - run.start for run in self.runs)

    def values(self, device: torch.device) -> dict[int, Any]:
        """Return the leaves, by index, once the runs are filled; torch's on ``device``."""
        made: dict[int, Any] = {}
        for block in self._blocks:
            host, moved = block.memory, None
            for i in block.members:
                if device.type != "cpu" and self._tensors[i].kind == "torch":
                    moved = block.memory = host.to(device) if moved is None else moved
                else:  # an array: it loses its ties to tensors that are on a device
                    block.memory = host
                made[i] = block.value(self._tensors[i])
        return made


class Block:
    """Memory for addresses that were one piece of memory when they were saved."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.members: list[int] = []
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._pad = 0
        self._bytes: dict[int, bytes] = {}

    def allocate(self, tensors: Sequence[TensorRecord]) -> None:
        """Take memory such that every member is aligned to its elements."""
        items = [(tensors[i].shards[0].start, item_bytes(tensors[i])) for i in self.members]
        items = [(start, width) for start, width in items if width <= 16]
        for pad in range(16):
            if all((start - self.start + pad) % width == 0 for start, width in items):
                self._pad = pad
                break
        else:
            raise FormatError("tensors that share memory in the checkpoint are not aligned to it")
        self.memory = _memory(self.stop - self.start + self._pad)

    def array(self) -> Bytes:
        return self.memory.numpy()[self._pad :]

    def value(self, record: TensorRecord) -> Any:
        """Return the leaf of a record, sharing this memory."""
        offset = self._pad + record.shards[0].start - self.start
        if record.kind == "torch":
            return _tensor(self.memory, offset, record)
        raw = self.memory.numpy()[offset : offset + extent_bytes(record)]
        if record.kind == "bytes":
            # bytes with the same start are the same, and one object suffices
            if offset not in self._bytes:
                self._bytes[offset] = raw.tobytes()
            return self._bytes[offset]
        if raw.size == 0:
            return np.empty(record.shape, numpy_dtype(record.dtype))
        return raw.view(numpy_dtype(record.dtype)).reshape(record.shape)


def _memory(nbytes: int) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as cause:
        raise LoadError(f"there is no memory for a tensor of {nbytes} bytes: {cause}") from cause


def _tensor(memory: torch.Tensor, offset: int, record: TensorRecord) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, record.dtype)
    if 0 in record.shape:
        tensor = torch.empty(record.shape, dtype=dtype, device=memory.device)
    else:
        strides = record.shards[0].strides or _row_major(record.shape)
        tensor = torch.empty(0, dtype=dtype, device=memory.device)
        tensor.set_(
            memory.untyped_storage(), offset // tensor.element_size(), record.shape, strides
        )
    if record.parameter:
        return torch.nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.requires_grad_() if record.requires_grad else tensor


def _row_major(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]


def fill_run(record: TensorRecord, into: torch.Tensor | np.ndarray[Any, Any]) -> Run:
    """Return the run that fills a live tensor or array: in its own memory, if that fits."""
    start, nbytes = record.shards[0].start, extent_bytes(record)
    if isinstance(into, np.ndarray):
        if into.flags.c_contiguous:
            return Run(start, nbytes, into.reshape(-1).view(np.uint8) if nbytes else _empty())
        return _detour(record, start, nbytes, lambda new: np.copyto(into, new))
    strides = record.shards[0].strides
    same = into.is_contiguous() if strides is None else list(into.stride()) == strides
    if same and into.is_cpu and not into.is_conj() and not into.is_neg():
        offset = int(into.storage_offset()) * into.element_size()
        return Run(start, nbytes, byte_alias(into, offset, nbytes).numpy() if nbytes else _empty())

    def put(new: torch.Tensor) -> None:
        as_integers = INTEGERS.get(into.element_size())
        with torch.no_grad():
            if as_integers is None or into.is_conj() or into.is_neg():
                into.copy_(new)
            else:
                into.view(as_integers).copy_(new.view(as_integers))

    return _detour(record, start, nbytes, put)


def _empty() -> Bytes:
    return np.empty(0, np.uint8)


def _detour(record: TensorRecord, start: int, nbytes: int, put: Callable[[Any], None]) -> Run:
    """Return a run that fills memory of its own, and then puts it where it belongs."""
    block = Block(start, start + nbytes)

    def memory() -> Bytes:
        block.memory = _memory(nbytes)
        return block.array()

    def finish() -> None:
        put(block.value(record).detach() if record.kind == "torch" else block.value(record))
        block.memory = torch.empty(0, dtype=torch.uint8)

    return Run(start, nbytes, memory, finish)
