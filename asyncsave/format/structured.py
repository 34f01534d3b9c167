"""Structured: NumPy's arrays of records, as their bytes and a key that says what these are.

Pure: no threads, no files, no clock.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dtypes import numpy_dtype


def of_type(value: Any, kind: type) -> Any:
    """Return a value of exactly this type; TypeError for others."""
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


_MOST_FIELDS = 4096


def _dtype_apart(dtype: np.dtype[Any]) -> Any:
    """Return a key that says what a structured dtype is; ValueError if it holds Python objects."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return ("array", _dtype_apart(base), *shape)
    if dtype.names is None:
        if dtype.kind not in "?biufcSUMmV" or dtype.itemsize == 0:
            raise ValueError(f"it has a field of dtype {dtype}, which is no plain memory")
        return dtype.str
    fields = [(name, *dtype.fields[name][:2]) for name in dtype.names]  # type: ignore[index]
    return (
        "struct",
        dtype.itemsize,
        dtype.isalignedstruct,
        *((name, offset, _dtype_apart(inner)) for name, inner, offset in fields),
    )


def _dtype(of: Any, depth: int = 0) -> np.dtype[Any]:
    """Return the dtype of such a key, in which no field goes beyond its struct."""
    if depth > 8:
        raise ValueError("a dtype in a dtype, and so on")
    if isinstance(of, str):
        return np.dtype(of) if of.startswith("|V") and of[2:].isdecimal() else numpy_dtype(of)
    kind, *rest = of
    if kind == "array":
        base, *shape = rest
        return np.dtype((_dtype(base, depth + 1), tuple(of_type(n, int) for n in shape)))
    itemsize, aligned, *fields = rest
    if kind != "struct" or len(fields) > _MOST_FIELDS:
        raise ValueError("a dtype that is none")
    return np.dtype(
        {
            "names": [of_type(name, str) for name, *_ in fields],
            "offsets": [of_type(offset, int) for _, offset, _ in fields],
            "formats": [_dtype(inner, depth + 1) for *_, inner in fields],
            "itemsize": of_type(itemsize, int),
        },
        align=of_type(aligned, bool),
    )


def records_memory(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the memory of a structured array: uint8, of one more dimension, the element's bytes.

    Shares memory.
    """
    bare = value.view(np.ndarray)
    plain = bare.view(np.dtype((np.void, bare.dtype.itemsize)))
    first: Any = plain.__array_interface__
    shape, strides = (*plain.shape, plain.itemsize), (*plain.strides, 1)
    view = _Memory()
    view.base = value
    view.__array_interface__ = {
        "version": 3,
        "typestr": "|u1",
        "data": first["data"],
        "shape": shape,
        "strides": strides,
    }
    return np.asarray(view)


class _Memory:
    """What NumPy makes an array of without a copy, and keeps alive with it."""

    base: Any
    __array_interface__: dict[str, Any]


def records_apart(value: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Return a structured array's memory, and a key that says what its dtype is.

    Raises:
        ValueError: it holds what cannot be saved.
    """
    key = _dtype_apart(value.dtype)
    if _dtype(key) != value.dtype:  # titles, say
        raise ValueError(f"its dtype {value.dtype} says more than names, offsets and formats")
    return records_memory(value), key


def records(of: Any, args: Any) -> Any:
    """Return the structured array of such memory and such a key.

    Raises:
        ValueError, TypeError: it cannot be.
    """
    dtype = _dtype(args)
    if of_type(of, np.ndarray).dtype != np.uint8 or of.ndim < 1 or dtype.names is None:
        raise ValueError("an array of records that is none")
    if of.shape[-1] != dtype.itemsize or not dtype.itemsize:
        raise ValueError(f"records of {of.shape[-1]} bytes with a dtype of {dtype.itemsize}")
    return np.ascontiguousarray(of).view(dtype).reshape(of.shape[:-1])


def record_apart(value: np.void) -> tuple[Any, Any]:
    """Do what `records_apart` does for one record."""
    return records_apart(np.asarray(value))


def record(of: Any, args: Any) -> Any:
    """Do what `records` does for one record."""
    return records(of, args)[()]
