"""Tangle: live values that share memory in another way than the checkpoint's do.

Two names of a state may be one piece of memory: tied weights, a tensor and its slice, the columns
of a matrix. Where the checkpoint has the same ties, filling one fills the other with the same
bytes, and nothing is to be done. Everywhere else, what is written for one might be lost by what is
written for the next. So such values are filled in thought first: only if every name has then what
the checkpoint says are they filled in the state.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from .fills import plain_bytes
from .live import Bulk, Target, is_dense
from .match import show


class _Span(msgspec.Struct, frozen=True, gc=False):
    """Where a live value lies on its device: byte addresses, ``first`` is its first element's."""

    target: Target
    device: str
    low: int
    high: int
    first: int


class Untangled(msgspec.Struct, frozen=True):
    """What is to be filled, in two sorts.

    Attributes:
        free: values, each with a leaf, that no other one's filling could change.
        tangled: groups of those that might change each other, in the order in which they are to be
            filled; and each number, in a group of its own.
    """

    free: list[Target]
    tangled: list[list[Target]]


def untangle(targets: Sequence[Target]) -> Untangled:
    """Tell values that others' filling cannot change from those that it may."""
    tangled = [
        [span.target for span in group]
        for group in _overlapping(targets)
        if len(set(map(_tie, group))) > 1
    ]
    found = {id(target) for group in tangled for target in group}
    free: list[Target] = []
    for target in targets:
        if target.leaf is None and id(target) not in found:
            tangled.append([target])
        elif id(target) not in found:
            free.append(target)
    return Untangled(free, tangled)


def _overlapping(targets: Sequence[Target]) -> Iterator[list[_Span]]:
    """Yield where values lie, in groups of at least two whose memory overlaps. HOT (per leaf)."""
    spans = [span for target in targets if (span := _span(target)) is not None]
    spans.sort(key=operator.attrgetter("device", "low"))
    group: list[_Span] = []
    device, high = "", 0
    for span in spans:
        if span.low < high and span.device == device:
            group.append(span)
            high = max(high, span.high)
            continue
        if len(group) > 1:
            yield group
        group = [span]
        device, high = span.device, span.high
    if len(group) > 1:
        yield group


def _span(target: Target) -> _Span | None:
    """Return where a value lies; None if it has no elements."""
    into = target.into
    if isinstance(into, np.ndarray):
        first, nbytes, device = into.ctypes.data, into.nbytes, "cpu"
    else:
        first, nbytes = into.data_ptr(), into.nbytes
        device = "cpu" if into.is_cpu else str(into.device)
    if not nbytes:
        return None
    if is_dense(into):
        return _Span(target, device, first, first + nbytes, first)
    low, high = first, first + into.itemsize
    for size, step in zip(into.shape, _byte_strides(into), strict=True):
        if step < 0:
            low += (size - 1) * step
        else:
            high += (size - 1) * step
    return _Span(target, device, low, high, first)


def _byte_strides(into: Bulk) -> tuple[int, ...]:
    if isinstance(into, np.ndarray):
        return into.strides
    return tuple(step * into.itemsize for step in into.stride())


def _tie(span: _Span) -> Any:
    """Return what is the same for values that cannot contradict each other."""
    target, leaf = span.target, span.target.leaf
    if leaf is None:
        return (id(target),)
    into, strides = target.into, leaf.strides
    lazy = not isinstance(into, np.ndarray) and (into.is_conj() or into.is_neg())
    if not lazy and not target.cast and _steps_like(into, strides):
        # one distance from each byte in memory to its address in the checkpoint
        return leaf.rank, leaf.start - span.first
    saved = None if strides is None else tuple(strides)
    here = span.first, _byte_strides(into), tuple(into.shape), into.dtype, lazy, target.cast
    return leaf.rank, leaf.start, saved, *here


def _steps_like(into: Bulk, strides: list[int] | None) -> bool:
    """Whether a live value's elements lie as those of a leaf with these strides do."""
    if isinstance(into, np.ndarray):
        return strides is None and into.flags.c_contiguous
    return into.is_contiguous() if strides is None else list(into.stride()) == strides


def contradictions(group: Sequence[Target], values: Mapping[int, Any]) -> list[str]:
    """Return why the values cannot all be in the memory that some targets share.

    Args:
        group: targets in the order in which they will be filled.
        values: the leaves, by index.
    """
    spans = [span for target in group if (span := _span(target)) is not None]
    low = min((span.low for span in spans), default=0)
    high = max((span.high for span in spans), default=0)
    memory = np.zeros(high - low, np.uint8)
    wanted = []
    for span in spans:
        wanted.append(plain_bytes(span.target, value_of(span.target, values)))
        _seen(memory, span, low)[...] = wanted[-1]
    owners: Any = None
    reasons = []
    for span, new in zip(spans, wanted, strict=True):
        lost = _seen(memory, span, low) != new
        if not lost.any():
            continue
        if owners is None:
            owners = np.zeros(high - low, np.uint32)
            for i, each in enumerate(spans):
                _seen(owners, each, low)[...] = i
        other = spans[int(_seen(owners, span, low)[lost][0])]
        reasons.append(
            f"{show(span.target.name)}: shares memory in the state with {show(other.target.name)}, "
            "and the checkpoint has another value for each; give one of them memory of its own "
            "(clone()), or restore only one of them (keys=)"
        )
    return reasons


def value_of(target: Target, values: Mapping[int, Any]) -> Any:
    """Return what a target is filled with."""
    return target.number if target.leaf is None else values[target.leaf.index]


def _seen(memory: Any, span: _Span, low: int) -> Any:
    """Return the elements of a live value in an image of its memory, byte by byte."""
    into = span.target.into
    unit = memory.itemsize
    strides = (*(step * unit for step in _byte_strides(into)), unit)
    return np.ndarray(
        (*into.shape, into.itemsize), memory.dtype, memory.data, (span.first - low) * unit, strides
    )
