"""Fills: live tensors and arrays, filled in place, and nothing beside their own elements.

Reads are aimed at a value's own memory where it is all that lies between its first byte and its
last one; elsewhere (another layout, gaps with other values, a device, another dtype) at memory on
the way there, from which `put` copies the elements.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..format.leaf import Leaf
from ..pages import Bytes
from ..reading.fill import Fill
from ..reading.groups import Group, grouped
from ..state.tensors import INTEGERS, byte_alias
from .live import Bulk, Target, extent
from .new import BATCH_BYTES, NOTHING, SMALL_BYTES, Block

_FEWEST = 4
"""Tensors in a batch: of fewer, each is read by itself."""


def fills_of(targets: Sequence[Target]) -> list[Fill]:
    """Return fills for live tensors and arrays, each with a leaf and with elements of its own."""
    small: list[Target] = []
    others: list[Target] = []
    for target in targets:
        (small if _is_small(target) else others).append(target)
    fills: list[Fill] = []
    for batch in _batches(small):
        if len(batch) < _FEWEST:
            others += batch
        else:
            fills.append(_batch_fill(batch))
    detours: list[Target] = []
    for target in others:
        memory = _own_memory(target)
        if memory is None:
            detours.append(target)
        else:
            leaf = leaf_of(target)
            fills.append(Fill(leaf.start, memory.nbytes, memory, rank=leaf.rank))
    return fills + _detours(detours)


def leaf_of(target: Target) -> Leaf:
    """Return the leaf that a value is to be filled with, where it is not a number."""
    assert target.leaf is not None
    return target.leaf


# -- small tensors side by side --------------------------------------------------------------------

_MOVED = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64})
"""Of these, ``copy_`` of one into the same keeps every bit; others are seldom small and many."""


def _is_small(target: Target) -> bool:
    """Whether a value can be filled together with others, by copies. HOT (per leaf)."""
    into = target.into
    return (
        isinstance(into, torch.Tensor)
        and into.dtype in _MOVED
        and 0 < into.nbytes <= SMALL_BYTES
        and not target.cast
        and target.leaf is not None
        and target.leaf.strides is None
        and into.is_contiguous()
        and into.is_cpu
        and not into.is_neg()
        and not into.is_inference()
    )


def _batches(small: list[Target]) -> list[list[Target]]:
    """Return small tensors in lists, in each those of one dtype whose leaves lie side by side."""
    batches: list[list[Target]] = []
    first = last = None
    for target in sorted(small, key=operator.attrgetter("leaf.rank", "leaf.start")):
        leaf = leaf_of(target)
        if first is None or last is None or not _goes_on(first, last, leaf):
            batches.append([])
            first = leaf
        batches[-1].append(target)
        last = leaf
    return batches


def _goes_on(first: Leaf, last: Leaf, leaf: Leaf) -> bool:
    """Whether a leaf lies right behind those of a batch, which can be longer."""
    return (
        leaf.start == last.stop
        and leaf.dtype is last.dtype
        and leaf.rank == last.rank
        and last.stop - first.start < BATCH_BYTES
    )


def _batch_fill(batch: list[Target]) -> Fill:
    live: list[Any] = [target.into for target in batch]
    leaves = [leaf_of(target) for target in batch]
    block = Block(Group(leaves[0].rank, leaves[0].start, leaves[-1].stop, 0, ()))

    def finish() -> None:
        pieces = block.memory.view(live[0].dtype).split([into.numel() for into in live])
        new = [piece.view(into.shape) for into, piece in zip(live, pieces, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(live, new)
        block.memory = NOTHING

    return Fill(block.start, block.nbytes, block.array, finish, block.rank)


# -- one by one ------------------------------------------------------------------------------------


def _own_memory(target: Target) -> Bytes | None:
    """Return the memory of a live value, if the stored bytes in their order are all of it."""
    into = target.into
    if target.cast:
        return None
    if isinstance(into, np.ndarray):
        return into.reshape(-1).view(np.uint8) if into.flags.c_contiguous and into.size else None
    if not into.is_cpu or into.is_conj() or into.is_neg() or not _is_laid_out_as(into, target):
        return None
    nbytes = into.numel() * into.element_size()
    if not nbytes:
        return None
    offset = int(into.storage_offset()) * into.element_size()
    return byte_alias(into, offset, nbytes).numpy()


def _is_laid_out_as(into: torch.Tensor, target: Target) -> bool:
    """Whether a live tensor's elements lie as its leaf's do, and without gaps."""
    strides = leaf_of(target).strides
    if strides is None:
        return into.is_contiguous()
    return list(into.stride()) == strides and extent(into.shape, into.stride()) == into.numel()


def _detours(targets: list[Target]) -> list[Fill]:
    """Return fills of memory on the way, from which live values get their elements."""
    by_leaf: dict[int, list[Target]] = {}
    for target in targets:
        by_leaf.setdefault(leaf_of(target).index, []).append(target)
    fills = []
    # what overlaps is read once: a hundred columns of one tensor would be a hundred of it
    for group in grouped(leaf_of(same[0]) for same in by_leaf.values()):
        members = [target for leaf in group.members for target in by_leaf[leaf.index]]
        fills.append(_detour(Block(group), members))
    return fills


def _detour(block: Block, targets: Sequence[Target]) -> Fill:
    def finish() -> None:
        for target in targets:
            put(target, block.value(leaf_of(target)))
        block.memory = NOTHING

    return Fill(block.start, block.nbytes, block.array, finish, block.rank)


# -- elements --------------------------------------------------------------------------------------


def put(target: Target, new: Any) -> None:
    """Copy a value that a live tensor or array can hold into it, and into nothing beside it."""
    into = target.into
    if isinstance(into, np.ndarray):
        with np.errstate(over="ignore"):  # a cast to a narrower dtype may end at infinity
            into[...] = new
        return
    # an inference tensor can be changed in this mode only, and no other kind should be
    with torch.no_grad(), torch.inference_mode(into.is_inference()):
        if target.leaf is None:
            into.fill_(new)
            return
        new = new.detach()
        integers = INTEGERS.get(into.element_size())
        if integers is None or target.cast or into.is_conj() or into.is_neg():
            into.copy_(new)
        else:
            into.view(integers).copy_(new.view(integers))


def plain_bytes(target: Target, new: Any) -> Any:
    """Return what ``put`` would write: of each element the bytes, as a last dimension."""
    into: Bulk = target.into
    if isinstance(into, np.ndarray):
        there: Any = np.empty(into.shape, into.dtype)
        put(Target(target.name, there, target.leaf, cast=target.cast), new)
        return there.reshape(-1).view(np.uint8).reshape(*into.shape, into.itemsize)
    with torch.inference_mode(False):
        held = torch.empty(into.shape, dtype=into.dtype, device="cpu")
        put(Target(target.name, held, target.leaf, cast=target.cast), new)
        if into.is_conj():
            held = held.conj().resolve_conj()
        if into.is_neg():
            held = held.neg()
        flat = byte_alias(held, 0, held.numel() * held.element_size()).numpy()
        return flat.reshape(*into.shape, into.element_size())
