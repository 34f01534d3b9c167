"""Tensors that share memory in ways that no program's tensors do."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from .forge import Attack, chunk, forge, padded, tensor

DATA = random.Random(0).randbytes(1 << 20)


def build(records: list[dict[str, Any]], directory: Path) -> None:
    tree = {"t": "list", "items": [{"t": "tensor", "i": i} for i in range(len(records))]}
    forge(directory, tree, tensors=records, chunks=[chunk(DATA)], data=padded(DATA))


def bytes_of(start: int, length: int) -> dict[str, Any]:
    return tensor((length,), start, kind="bytes")


MIB = len(DATA)

ATTACKS = {
    # each bytes value is a copy of its own, so 2000 records are 2 GB
    "bytes that overlap": Attack(
        partial(build, [bytes_of(i, MIB - i) for i in range(2000)]), says="bytes values"
    ),
    "bytes that end together": Attack(
        partial(build, [bytes_of(0, MIB - i) for i in range(2000)]), says="bytes values"
    ),
    "the same bytes 2000 times": Attack(partial(build, [bytes_of(0, MIB)] * 2000), None),
    "bytes side by side": Attack(
        partial(build, [bytes_of(i << 10, 1 << 10) for i in range(1024)]), None
    ),
    "bytes and a tensor": Attack(partial(build, [bytes_of(3, 1000), tensor((MIB,))]), None),
    "the same tensor 2000 times": Attack(partial(build, [tensor((MIB,))] * 2000), None),
    "tensors that overlap": Attack(
        partial(build, [tensor((MIB - i,), i) for i in range(2000)]), None
    ),
    "not aligned to one another": Attack(
        partial(build, [tensor((9,), i, dtype="float64") for i in range(3)] + [tensor((99,), 0)]),
        says="not aligned",
    ),
    "of many kinds": Attack(
        partial(
            build,
            [
                tensor((9,), 0, dtype="float32"),
                tensor((9,), 4, dtype="complex64"),
                tensor((3,), 2, dtype="|S7", kind="numpy"),
                tensor((9,), 8, dtype=">f4", kind="numpy"),
            ],
        ),
        None,
    ),
}
