"""Live: what is in a state now, and whether its memory can be filled.

A live tensor may be a view of anything, may be tied to others, and may have no memory at all. Here
is what a match must know of one before it says that it can be filled, and what `fills_of` must
before it aims a read at its memory.
"""

from __future__ import annotations

import functools
from typing import Any, Union

import msgspec
import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..format.leaf import Leaf
from ..state.classes import has_method
from ..state.values import TORCH_DTYPES

Bulk = Union[torch.Tensor, "np.ndarray[Any, Any]"]

PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


class Target(msgspec.Struct, frozen=True, gc=False):
    """One live tensor or array, and what it is to be filled with.

    Attributes:
        name: its fqn in the state.
        into: the tensor or array.
        leaf: the leaf of the checkpoint; None where it has a plain value there.
        number: that value, in place of a leaf.
        cast: whether the dtype is another one, or the number is rounded.
    """

    name: str
    into: Bulk
    leaf: Leaf | None
    number: Any = None
    cast: bool = False


_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(into: Bulk) -> str:
    """Return the name of the dtype that a leaf of ``into`` would have."""
    return into.dtype.str if isinstance(into, np.ndarray) else _NAMES[into.dtype]


def kind_of(into: Bulk) -> str:
    """Return the kind that a leaf of ``into`` would have."""
    return "numpy" if isinstance(into, np.ndarray) else "torch"


def bare(into: Bulk) -> Bulk:
    """Return the memory of an array, without what its class makes of an index; others as they are.

    A row of a ``numpy.matrix`` has two dimensions, for example.
    """
    if isinstance(into, np.ndarray) and not isinstance(into, np.ma.MaskedArray):
        return np.asarray(into)
    return into


def loads_itself(value: Any) -> bool:
    """Whether a live value is an object that has ``load_state_dict``."""
    return has_method(value, "load_state_dict")


def refusal(into: Bulk) -> str | None:
    """Return why ``into`` cannot be filled in place, or None if it can."""
    if isinstance(into, np.ndarray):
        if isinstance(into, np.ma.MaskedArray):
            return "the array in the state has a mask, which would stay as it is; pass its data"
        if not into.flags.writeable:
            return "the array in the state is read-only"
    elif into.is_meta:
        return (
            "the tensor in the state is on the meta device and has no memory; call "
            "to_empty(device=…) first, or load() the checkpoint and use "
            "load_state_dict(…, assign=True)"
        )
    elif into.layout is not torch.strided or (
        type(into) not in PLAIN_TENSORS and is_traceable_wrapper_subclass(into)
    ):
        return (
            f"the tensor in the state is a {type(into).__name__} with layout {into.layout}, which "
            "cannot be filled in place; pass the plain tensor that it is made of"
        )
    elif into.numel() and not into.data_ptr():
        return "the memory of the tensor in the state has been given back; allocate it first"
    if is_dense(into) or not overlaps_itself(into):
        return None
    what = "array" if isinstance(into, np.ndarray) else "tensor"
    return (
        f"the {what} in the state has elements that share memory (expand(), as_strided()); it "
        "cannot be filled in place"
    )


def is_dense(into: Bulk) -> bool:
    """Whether ``into`` is contiguous, row-major."""
    if isinstance(into, np.ndarray):
        return into.flags.c_contiguous
    return into.is_contiguous()


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements (or bytes, as strides are) lie from the first to the last one."""
    return 1 + sum((size - 1) * abs(step) for size, step in zip(shape, strides, strict=True))


def overlaps_itself(into: Bulk) -> bool:
    """Whether any two elements share memory."""
    strides = into.strides if isinstance(into, np.ndarray) else into.stride()
    unit = into.itemsize if isinstance(into, np.ndarray) else 1
    dims = [(abs(step), size) for size, step in zip(into.shape, strides, strict=True) if size > 1]
    if any(size == 0 for size in into.shape):
        return False
    reach = unit
    for step, size in sorted(dims):
        if step < reach:
            break  # not one dimension inside the other; it may be free of overlaps all the same
        reach += (size - 1) * step
    else:
        return False
    shape, steps = tuple(size for _, size in dims), tuple(step for step, _ in dims)
    total = extent(shape, steps) - 1 + unit
    count = int(np.prod(shape, dtype=object)) * unit
    if count > total:
        return True
    touched = np.zeros(total, np.uint8)
    np.lib.stride_tricks.as_strided(touched, (*shape, unit), (*steps, 1))[...] = 1
    return int(np.count_nonzero(touched)) < count


# -- numbers into tensors of one element ----------------------------------------------------------


def as_number(value: Any, into: Bulk) -> Any:
    """Return the number that ``value`` is, if ``into``, with no dimension, may be filled with it.

    None if it may not: only a number of the same sort goes into a tensor, or an int into floats.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(into, np.ndarray):
        sorts = {"b": bool, "i": int, "u": int, "f": float, "c": complex}
        sort: Any = sorts.get(into.dtype.kind)
    elif into.dtype is torch.bool:
        sort = bool
    elif into.dtype.is_complex:
        sort = complex
    else:
        sort = float if into.dtype.is_floating_point else int
    fits = type(value) is sort or (type(value) is int and sort is float)
    return value if fits and len(into.shape) == 0 else None


def held(into: Bulk, number: Any) -> Any:
    """Return what an element of ``into`` is once it is ``number``, which may be rounded.

    None if it cannot be: too large for the dtype, or of that dtype torch fills nothing.
    """
    try:
        if isinstance(into, np.ndarray):
            scratch: Any = np.empty((), into.dtype)
            with np.errstate(over="ignore"):
                scratch[...] = number
        else:
            if type(number) is int and into.dtype.is_floating_point:
                number = float(number)  # torch takes no longer int than 64 bits
            scratch = torch.empty((), dtype=into.dtype, device="cpu").fill_(number)
        return scratch.item()
    except (OverflowError, RuntimeError, ValueError):
        return None


# -- other dtypes ---------------------------------------------------------------------------------


def is_float(into: Bulk) -> bool:
    """Whether the elements are real floating numbers."""
    if isinstance(into, np.ndarray):
        return str(into.dtype.kind) == "f"
    return into.dtype.is_floating_point


@functools.lru_cache(256)
def _casts(saved: torch.dtype, own: torch.dtype) -> bool:
    try:  # the narrowest ones have no conversions
        torch.zeros(1, dtype=saved, device="cpu").to(own)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def can_cast(saved: str, into: Bulk) -> bool:
    """Whether both are of floating dtypes, between which there is a conversion."""
    if not is_float(into):
        return False
    if isinstance(into, np.ndarray):
        return saved[1:2] == "f"
    dtype = TORCH_DTYPES.get(saved)
    if dtype is None or not dtype.is_floating_point:
        return False
    return _casts(dtype, into.dtype)
