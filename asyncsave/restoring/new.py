"""New: new tensors, arrays and bytes for leaves of a checkpoint.

Leaves whose addresses overlap become views of one new storage, so ties come back as ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import LoadError
from ..format.leaf import Leaf
from ..pages import Bytes
from ..reading.fill import Fill
from ..reading.groups import Group, grouped
from ..state.values import TORCH_DTYPES, torch_dtype

SMALL_BYTES = 4 << 10
"""Up to this length, what a tensor costs by itself is more than its bytes.

Measured (bench/knobs.py small), loads of 20,000 tensors of one element: 0.53 s, and 1.37 one by
one.
"""

BATCH_BYTES = 4 << 20
"""How much of small tensors is done at once. From 64 KiB to 16 MiB make no difference
(bench/knobs.py together).
"""

NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class NewLeaves:
    """New memory for leaves; those that overlap share it, as they did when they were saved.

    Attributes:
        fills: what is to be read before there are `values`.

    Raises:
        UnsupportedVersionError: a leaf is of a dtype that this torch does not have.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            if leaf.kind == "torch" and leaf.dtype.name not in TORCH_DTYPES:
                _torch_dtype(leaf)  # refused before a byte is read
        self._blocks = _batched(map(Block, grouped(leaves)))
        self.fills: list[Fill] = []
        with torch.inference_mode(False):  # else what is loaded could never be trained
            for block in self._blocks:
                self.fills.append(Fill(block.start, block.nbytes, block.array(), rank=block.rank))

    @property
    def nbytes(self) -> int:
        """Bytes of all their memory."""
        return sum(block.nbytes for block in self._blocks)

    def values(self, device: torch.device) -> dict[int, Any]:
        """Return the leaves, by index, once the fills are done; torch's on ``device``."""
        made: dict[int, Any] = {}
        with torch.inference_mode(False):
            for block in self._blocks:
                made.update(block.copies(device) if block.is_batch else block.values(device))
        return made


class Block:
    """Memory for addresses that were one piece of memory when they were saved.

    Attributes:
        rank: whose addresses they are.
        start: the first one.
        stop: the one behind the last one.
        members: the leaves that lie there.
        memory: the memory; empty until `array` has taken it.
        is_batch: the members lie side by side, shared none, and are to have their own.
    """

    __slots__ = ("_bytes", "_pad", "is_batch", "members", "memory", "rank", "start", "stop")

    def __init__(self, group: Group) -> None:
        self.rank, self.start, self.stop = group.rank, group.start, group.stop
        self.members = list(group.members)
        self.memory = NOTHING
        self.is_batch = False
        self._pad = group.pad
        self._bytes: dict[int, bytes] | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes of address space it has."""
        return self.stop - self.start

    def array(self) -> Bytes:
        """Take the memory, and return that of the addresses."""
        self.memory = _memory(self.nbytes + self._pad)
        return self.memory.numpy()[self._pad :] if self._pad else self.memory.numpy()

    def copies(self, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a batch's leaves, each in memory of its own, and give this one back."""
        lengths = [leaf.nbytes for leaf in self.members]
        for leaf, piece in zip(self.members, self.memory.split(lengths), strict=True):
            own = piece.clone().view(TORCH_DTYPES[leaf.dtype.name]).view(leaf.shape)
            yield leaf.index, _marked(own.to(device), leaf)
        self.memory = NOTHING

    def values(self, device: torch.device) -> Iterator[tuple[int, Any]]:
        """Yield the leaves, which share this memory, or, on another device, its copy there."""
        host, moved = self.memory, None
        for leaf in self.members:
            if device.type != "cpu" and leaf.kind == "torch":
                moved = self.memory = host.to(device) if moved is None else moved
            else:  # an array: it loses its ties to tensors that are on a device
                self.memory = host
            yield leaf.index, self.value(leaf)

    def value(self, leaf: Leaf) -> Any:
        """Return the value of a leaf, sharing this memory."""
        offset = self._pad + leaf.start - self.start
        if leaf.kind == "torch":
            return _tensor(self.memory, offset, leaf)
        raw = self.memory.numpy()[offset : offset + leaf.nbytes]
        if leaf.kind == "bytes":
            # bytes with the same start are the same, and one object suffices
            if self._bytes is None:
                self._bytes = {}
            if offset not in self._bytes:
                self._bytes[offset] = raw.tobytes()
            return self._bytes[offset]
        dtype = np.dtype(leaf.dtype.numpy)
        return raw.view(dtype).reshape(leaf.shape) if raw.size else np.empty(leaf.shape, dtype)


def _batched(blocks: Iterable[Block]) -> list[Block]:
    """Return the blocks, with neighbours that are small tensors in one, as each costs time."""
    result: list[Block] = []
    for block in blocks:
        last = result[-1] if result else None
        if not _is_small_tensor(block):
            result.append(block)
        elif last is not None and last.is_batch and _goes_on(last, block):
            last.stop = block.stop
            last.members += block.members
        else:
            block.is_batch = True
            result.append(block)
    return result


def _is_small_tensor(block: Block) -> bool:
    leaf = block.members[0]
    return (
        0 < block.nbytes <= SMALL_BYTES
        and len(block.members) == 1
        and leaf.kind == "torch"
        and leaf.strides is None
    )


def _goes_on(batch: Block, block: Block) -> bool:
    """Whether a block lies right behind a batch, which can be longer."""
    is_next = batch.stop == block.start and batch.rank == block.rank
    return is_next and batch.nbytes < BATCH_BYTES


def _memory(nbytes: int) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except RuntimeError as cause:
        raise LoadError(f"there is no memory for a tensor of {nbytes} bytes: {cause}") from cause


def _torch_dtype(leaf: Leaf) -> torch.dtype:
    return torch_dtype(leaf.dtype.name, repr(leaf.name))


def _tensor(memory: torch.Tensor, offset: int, leaf: Leaf) -> torch.Tensor:
    """Return the tensor of a leaf, whose first byte is at ``offset`` in ``memory``."""
    dtype: torch.dtype = TORCH_DTYPES[leaf.dtype.name]
    if not leaf.nbytes:
        return _marked(_empty(leaf.shape, dtype, memory.device), leaf)
    tensor = torch.empty(0, dtype=dtype, device=memory.device)
    strides = leaf.strides or _row_major(leaf.shape)
    tensor.set_(memory.untyped_storage(), offset // leaf.dtype.nbytes, leaf.shape, strides)
    return _marked(tensor, leaf)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:  # steps beyond 64 bits; torch has such tensors by expand() alone
        ones = [min(size, 1) for size in shape]
        return torch.empty(ones, dtype=dtype, device=device).expand(shape)


def _marked(tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    if leaf.parameter:
        return torch.nn.Parameter(tensor, requires_grad=leaf.requires_grad)
    return tensor.requires_grad_() if leaf.requires_grad else tensor


def _row_major(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]
