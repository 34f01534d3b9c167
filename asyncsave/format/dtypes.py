"""Dtypes: the table of FORMAT.md, and what else asyncsave must know of each.

The one place that says which dtypes of torch can be saved. One that torch has and this table has
not is refused, since nobody could say how long its elements are; to add one, add a line here and to
FORMAT.md, and its bits to ``tests/numpy_reader.py``. NumPy's have no table: `numpy_row` makes the
row of one from its name. Knows no torch: names only.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError


@dataclass(frozen=True, slots=True)
class Dtype:
    """What is known of one dtype.

    Attributes:
        name: its name in a checkpoint: torch's without ``torch.``, or NumPy's ``dtype.str``.
        nbytes: length of an element.
        coding: of chunks of it, where bytes of elements are regrouped.
        numpy: NumPy's ``dtype.str`` of the same elements; "" where it has none.
        ml_dtypes: the name that the package ml_dtypes has for it; "" where there is none.
        exact: torch's ``copy_`` is known to keep every bit; others are copied as integers.
        complex: an element has two parts, and tensors may be lazily conjugated.
        floating: torch calls it a floating point type.
    """

    name: str
    nbytes: int
    coding: str = "zstd"
    numpy: str = ""
    ml_dtypes: str = ""
    exact: bool = False
    complex: bool = False
    floating: bool = False

    @property
    def has_gradient(self) -> bool:
        """Whether tensors of it may require one."""
        return self.floating or self.complex


_ROWS = (
    Dtype("bool", 1, numpy="|b1"),
    Dtype("uint8", 1, numpy="|u1", exact=True),
    Dtype("int8", 1, numpy="|i1", exact=True),
    *(Dtype(f"uint{bits}", 1) for bits in range(1, 8)),
    *(Dtype(f"int{bits}", 1) for bits in range(1, 8)),
    Dtype("bits8", 1),
    Dtype("bits1x8", 1),
    Dtype("bits2x4", 1),
    Dtype("bits4x2", 1),
    Dtype("float8_e4m3fn", 1, ml_dtypes="float8_e4m3fn", floating=True),
    Dtype("float8_e4m3fnuz", 1, ml_dtypes="float8_e4m3fnuz", floating=True),
    Dtype("float8_e5m2", 1, ml_dtypes="float8_e5m2", floating=True),
    Dtype("float8_e5m2fnuz", 1, ml_dtypes="float8_e5m2fnuz", floating=True),
    Dtype("float8_e8m0fnu", 1, ml_dtypes="float8_e8m0fnu", floating=True),
    Dtype("float4_e2m1fn_x2", 1, floating=True),
    Dtype("float16", 2, "bytes2", "<f2", exact=True, floating=True),
    Dtype("bfloat16", 2, "exp16.0", ml_dtypes="bfloat16", exact=True, floating=True),
    Dtype("int16", 2, "bytes2", "<i2", exact=True),
    Dtype("uint16", 2, "bytes2", "<u2"),
    Dtype("bits16", 2),
    Dtype("float32", 4, "exp32.0", "<f4", exact=True, floating=True),
    Dtype("int32", 4, "bytes4", "<i4", exact=True),
    Dtype("uint32", 4, "bytes4", "<u4"),
    Dtype("complex32", 4, "bytes2", complex=True),
    Dtype("bcomplex32", 4, "exp16.0", complex=True),
    Dtype("float64", 8, "bytes8", "<f8", exact=True, floating=True),
    Dtype("int64", 8, "bytes8", "<i8", exact=True),
    Dtype("uint64", 8, "bytes8", "<u8"),
    Dtype("complex64", 8, "exp32.0", "<c8", exact=True, complex=True),
    Dtype("complex128", 16, "bytes8", "<c16", exact=True, complex=True),
)

DTYPES: dict[str, Dtype] = {row.name: row for row in _ROWS}
"""torch's, by name, without ``torch.``."""

BY_NUMPY_NAME = {row.numpy: row.name for row in _ROWS if row.numpy and row.nbytes > 1}
"""torch's name of the dtype whose elements of several bytes NumPy has, too, by ``dtype.str``."""


# What `dtype.str` can be. numpy.dtype() takes far more: it warns of some, and evaluates others.
_NUMPY_DTYPE = re.compile(r"[<>|][biufcSUMm][0-9]{1,10}(\[[0-9]{0,10}[A-Za-z]{1,2}\])?")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype that ``name`` (a ``dtype.str``) says.

    Raises:
        FormatError: it is none that can be saved.
    """
    try:
        dtype = np.dtype(name) if _NUMPY_DTYPE.fullmatch(name) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and dtype.kind in "mM" and np.datetime_data(dtype)[1] < 1:
        dtype = None
    if dtype is None or dtype.str != name or not dtype.itemsize:
        raise FormatError(
            f"the checkpoint names the NumPy dtype {name!r:.40}, which is not allowed"
        )
    return dtype


@functools.lru_cache(256)
def numpy_row(name: str) -> Dtype:
    """Return the row of a dtype of NumPy's, by its ``dtype.str``; FormatError as `numpy_dtype`."""
    return Dtype(name, numpy_dtype(name).itemsize, numpy=name)
