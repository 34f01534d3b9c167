"""A size of 0 makes a tensor empty, whatever the other sizes are.

Their product is asked all the same: NumPy's with 1 in place of 0, and torch's in their order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, forge, tensor


def build(record: dict[str, Any], directory: Path) -> None:
    forge(directory, TENSOR, tensors=[record])


HUGE = (2**61, 0, 2**61)
RECORDS = {
    "torch": (tensor(HUGE), None),
    "torch, 16 bytes": (tensor(HUGE, dtype="complex128"), None),
    "torch, 2^122 before the 0": (tensor((2**61, 2**61, 0)), "FormatError"),
    "torch, 2^122, 16 bytes": (tensor((2**61, 2**61, 0), dtype="complex128"), "FormatError"),
    "torch, 2^64 before the 0": (tensor((2**33, 2**31, 0)), "FormatError"),
    "torch, just allowed before the 0": (tensor((2**33, 2**30, 0)), None),
    "torch, a parameter of 2^122": (
        tensor((2**61, 2**61, 0), dtype="float32", parameter=True),
        "FormatError",
    ),
    "torch, steps beyond 64 bits": (tensor((0, 2**61, 2**61)), None),
    "torch, strides that are not used": (tensor((2**61, 2**61, 0), strides=[0] * 3), "FormatError"),
    "numpy": (tensor(HUGE, kind="numpy", dtype="|u1"), "FormatError"),
    "numpy text": (tensor((0, 2**40), kind="numpy", dtype="<U500000000"), "FormatError"),
    "just allowed": (tensor((2**31, 0, 2**31)), None),
    "numpy, just allowed": (tensor((2**31, 0, 2**28), kind="numpy", dtype="<f8"), None),
    "huge elements": (tensor((0,), kind="numpy", dtype="<U500000000"), None),
    "start nowhere": (tensor((0,), 2**63), "FormatError"),
}

ATTACKS = {
    name: Attack(partial(build, record), raises) for name, (record, raises) in RECORDS.items()
}
