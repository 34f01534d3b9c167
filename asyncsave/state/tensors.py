"""Tensors: the bytes of a leaf, as they are. Pure: no threads, no files, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch

from ..format.dtypes import DTYPES
from .flatten import Bulk
from .sources import Copy, Source, address
from .values import TORCH_DTYPES

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype of the same width, in bytes, whose copies are plain moves."""


COPIED_AS_THEY_ARE = frozenset(
    dtype for name, dtype in TORCH_DTYPES.items() if name in DTYPES and DTYPES[name].exact
)
"""Dtypes that torch copies without touching a bit."""


def byte_alias(tensor: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of a tensor's storage from byte ``offset``, as uint8, sharing memory."""
    alias = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), offset, (nbytes,), (1,))


def copies(
    value: Bulk, source: Source, start: int, into: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bring a source's bytes from ``start`` on into memory, and fill that.

    Args:
        value: the leaf that the source is reached through.
        into: uint8, one dimension.

    Yields:
        (to, from) of each copy that remains to be made, of one shape; what NumPy has to copy is
        copied already.
    """
    stop = start + into.numel()
    if source.copy is Copy.RANGE:
        yield into, _memory(value, source.offset + start, into.numel())
    elif not isinstance(value, torch.Tensor):
        # NumPy itself: torch would warn about arrays that are read-only
        _copy_bytes(value, start, stop, into.numpy())
    else:
        # a pending conjugation or negation is carried out by copy_, which needs the real dtype
        if value.dtype not in COPIED_AS_THEY_ARE and not (value.is_conj() or value.is_neg()):
            value = value.view(INTEGERS[value.element_size()])
        width, done = value.element_size(), 0
        for box in _boxes(value, start // width, stop // width):
            nbytes = box.numel() * width
            yield into[done : done + nbytes].view(box.dtype).view(box.shape), box
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
