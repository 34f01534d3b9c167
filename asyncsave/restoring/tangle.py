"""Tangle: live values that share memory in another way than the checkpoint's do.

Two names of a state may be one piece of memory: tied weights, a tensor and its slice, the columns
of a matrix. Where the checkpoint has the same ties, filling one fills the other with the same
bytes, and nothing is to be done. Everywhere else, what one fill writes might be lost by the next.
So such fills are done in thought first: only if every name has then what the checkpoint says are
they done in the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ..format.manifest import TensorRecord
from .leaves import plain_bytes
from .live import Bulk, Fill


class _Span(msgspec.Struct, gc=False):
    """Where a live value lies: byte addresses on its device, and in bytes how to step there."""

    device: str
    low: int
    high: int
    first: int
    strides: tuple[int, ...]
    number: int


def untangle(
    tensors: Sequence[TensorRecord], fills: Sequence[Fill]
) -> tuple[list[Fill], list[list[Fill]]]:
    """Return the fills that harm no other one, and groups of those that might."""
    spans = [span for i, fill in enumerate(fills) if (span := _span(fill.into, i)) is not None]
    spans.sort(key=lambda span: (span.device, span.low))
    groups: list[list[_Span]] = []
    device, high = "", 0
    for span in spans:
        if not groups or span.device != device or span.low >= high:
            groups.append([span])
            device, high = span.device, span.high
        else:
            groups[-1].append(span)
            high = max(high, span.high)
    tangled = [
        [fills[span.number] for span in group]
        for group in groups
        if len(group) > 1 and len({_tie(tensors, fills[span.number], span) for span in group}) > 1
    ]
    apart = {id(fill) for group in tangled for fill in group}
    plain = [fill for fill in fills if id(fill) not in apart and fill.index >= 0]
    alone = [[fill] for fill in fills if id(fill) not in apart and fill.index < 0]
    return plain, tangled + alone


def _span(into: Bulk, number: int) -> _Span | None:
    if isinstance(into, np.ndarray):
        if not into.size:
            return None
        first, strides, width, device = into.ctypes.data, into.strides, into.itemsize, "cpu"
    else:
        if not into.numel():
            return None
        width = into.element_size()
        first, strides = into.data_ptr(), tuple(step * width for step in into.stride())
        device = "cpu" if into.is_cpu else str(into.device)
    low = first
    high = first + width
    for size, step in zip(into.shape, strides, strict=True):
        if step < 0:
            low += (size - 1) * step
        else:
            high += (size - 1) * step
    return _Span(device, low, high, first, strides, number)


def _tie(tensors: Sequence[TensorRecord], fill: Fill, span: _Span) -> Any:
    """Return what is the same for values that cannot contradict each other."""
    into = fill.into
    if fill.index < 0:
        return (id(fill),)
    record = tensors[fill.index]
    start, strides = record.shards[0].start, record.shards[0].strides
    lazy = not isinstance(into, np.ndarray) and (into.is_conj() or into.is_neg())
    if not lazy and not fill.cast:
        if strides is None:
            same = into.flags.c_contiguous if isinstance(into, np.ndarray) else into.is_contiguous()
        else:
            same = not isinstance(into, np.ndarray) and list(into.stride()) == strides
        if same:  # one distance from each byte in memory to its address in the checkpoint
            return start - span.first
    saved = None if strides is None else tuple(strides)
    return start, saved, span.first, span.strides, tuple(into.shape), into.dtype, lazy, fill.cast


def contradictions(group: Sequence[Fill], values: Mapping[int, Any]) -> list[str]:
    """Return why the values cannot all be in the memory that the fills share.

    Args:
        group: fills in the order in which they will be done.
        values: the leaves, by index.
    """
    spans = [(fill, span) for fill in group if (span := _span(fill.into, 0)) is not None]
    low = min((span.low for _, span in spans), default=0)
    high = max((span.high for _, span in spans), default=0)
    memory = np.zeros(high - low, np.uint8)
    wanted = []
    for fill, span in spans:
        wanted.append(plain_bytes(fill, value_of(fill, values)))
        _seen(memory, fill, span, low)[...] = wanted[-1]
    owners: Any = None
    reasons = []
    for (fill, span), new in zip(spans, wanted, strict=True):
        lost = _seen(memory, fill, span, low) != new
        if not lost.any():
            continue
        if owners is None:
            owners = np.zeros(high - low, np.uint32)
            for i, (each, place) in enumerate(spans):
                _seen(owners, each, place, low)[...] = i
        other = group_name(spans[int(_seen(owners, fill, span, low)[lost][0])][0])
        reasons.append(
            f"{group_name(fill)}: shares memory in the state with {other}, and the checkpoint has "
            "another value for each; give one of them memory of its own (clone()), or restore only "
            "one of them (keys=)"
        )
    return reasons


def group_name(fill: Fill) -> str:
    """Return the fqn of a fill, as messages show it."""
    return fill.name or "the state itself"


def value_of(fill: Fill, values: Mapping[int, Any]) -> Any:
    """Return what a fill puts."""
    return fill.value if fill.index < 0 else values[fill.index]


def _seen(memory: Any, fill: Fill, span: _Span, low: int) -> Any:
    """Return the elements of a live value in an image of its memory, byte by byte."""
    into = fill.into
    width = into.itemsize if isinstance(into, np.ndarray) else into.element_size()
    unit = memory.itemsize
    strides = (*(step * unit for step in span.strides), unit)
    return np.ndarray(
        (*into.shape, width), memory.dtype, memory.data, (span.first - low) * unit, strides
    )
