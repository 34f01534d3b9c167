"""Strides that make a few bytes an enormous tensor. It loads, as a view: nobody must copy it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

DATA = b"abcdefghijklmnop"

RECORDS: dict[str, dict[str, Any]] = {
    "2^62 elements of one byte": tensor((2**62 - 1,), strides=[0]),
    "2^40 elements": tensor((2**40,), strides=[0]),
    "2^20 by 2^20 by 16": tensor((2**20, 2**20, 16), strides=[0, 0, 1]),
    "a parameter of 2^40": tensor(
        (2**40,), dtype="float32", strides=[0], parameter=True, requires_grad=True
    ),
    "64 dimensions": tensor((1,) * 63 + (16,), strides=[2**61] * 63 + [1]),
    "elements that overlap": tensor((8, 8), strides=[1, 1]),
    "2^30 rows that overlap": tensor((2**30, 2), strides=[0, 1]),
}


def build(record: dict[str, Any], directory: Path) -> None:
    forge(directory, TENSOR, tensors=[record], chunks=[chunk(DATA)], data=padded(DATA))


ATTACKS = {name: Attack(partial(build, record), None) for name, record in RECORDS.items()} | {
    "2^63 elements": Attack(partial(build, tensor((2**63,), strides=[0]))),
    "2^31 cubed": Attack(partial(build, tensor((2**31,) * 3, strides=[0] * 3))),
    "2^60 of 8 bytes": Attack(
        partial(build, tensor((2**60,), dtype="float64", strides=[0])), "FormatError"
    ),
}
