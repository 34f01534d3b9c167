"""Dtypes: the table of FORMAT.md, and what else asyncsave must know of each.

The one place that says which dtypes of torch can be saved. One that torch has and this table has
not is refused, since nobody could say how long its elements are; to add one, add a line here and to
FORMAT.md, and its bits to ``tests/numpy_reader.py``. Knows no torch: names only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """What is known of one dtype.

    Attributes:
        nbytes: length of an element.
        coding: of chunks of it, where bytes of elements are regrouped.
        numpy: NumPy's name of the same elements, without the byte order; "" where it has none.
        ml_dtypes: the name that the package ml_dtypes has for it; "" where there is none.
        exact: torch's ``copy_`` is known to keep every bit; others are copied as integers.
        complex: an element has two parts, and tensors may be lazily conjugated.
        floating: torch calls it a floating point type.
    """

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


DTYPES: dict[str, Dtype] = {
    "bool": Dtype(1, numpy="?"),
    "uint8": Dtype(1, numpy="u1", exact=True),
    "int8": Dtype(1, numpy="i1", exact=True),
    **{f"uint{bits}": Dtype(1) for bits in range(1, 8)},
    **{f"int{bits}": Dtype(1) for bits in range(1, 8)},
    "bits8": Dtype(1),
    "bits1x8": Dtype(1),
    "bits2x4": Dtype(1),
    "bits4x2": Dtype(1),
    "float8_e4m3fn": Dtype(1, ml_dtypes="float8_e4m3fn", floating=True),
    "float8_e4m3fnuz": Dtype(1, ml_dtypes="float8_e4m3fnuz", floating=True),
    "float8_e5m2": Dtype(1, ml_dtypes="float8_e5m2", floating=True),
    "float8_e5m2fnuz": Dtype(1, ml_dtypes="float8_e5m2fnuz", floating=True),
    "float8_e8m0fnu": Dtype(1, ml_dtypes="float8_e8m0fnu", floating=True),
    "float4_e2m1fn_x2": Dtype(1, floating=True),
    "float16": Dtype(2, "bytes2", "f2", exact=True, floating=True),
    "bfloat16": Dtype(2, "exp16.0", ml_dtypes="bfloat16", exact=True, floating=True),
    "int16": Dtype(2, "bytes2", "i2", exact=True),
    "uint16": Dtype(2, "bytes2", "u2"),
    "bits16": Dtype(2),
    "float32": Dtype(4, "exp32.0", "f4", exact=True, floating=True),
    "int32": Dtype(4, "bytes4", "i4", exact=True),
    "uint32": Dtype(4, "bytes4", "u4"),
    "complex32": Dtype(4, "bytes2", complex=True),
    "bcomplex32": Dtype(4, "exp16.0", complex=True),
    "float64": Dtype(8, "bytes8", "f8", exact=True, floating=True),
    "int64": Dtype(8, "bytes8", "i8", exact=True),
    "uint64": Dtype(8, "bytes8", "u8"),
    "complex64": Dtype(8, "exp32.0", "c8", exact=True, complex=True),
    "complex128": Dtype(16, "bytes8", "c16", exact=True, complex=True),
}
"""By name, without ``torch.``."""

BY_NUMPY_NAME = {
    "<" + each.numpy: name for name, each in DTYPES.items() if each.numpy and each.nbytes > 1
}
"""torch's name of the dtype whose elements of several bytes NumPy has, too, by ``dtype.str``."""
