"""Files with holes: of any length, and no size. What is long must not be read because it is."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .forge import TENSOR, Attack, chunk, forge, padded, sign, tensor


def data(directory: Path) -> None:
    """A data file of 1 TiB, with a chunk at either end."""
    rank = {"files": [{"name": "rank-00000.data", "length": 1 << 40}]}
    chunks = [chunk(b"abcd"), chunk(bytes(4), offset=(1 << 40) - 4096)]
    tensors = [tensor((8,))]
    forge(directory, TENSOR, tensors=tensors, chunks=chunks, data=padded(b"abcd"), rank=rank)
    os.truncate(directory / "rank-00000.data", 1 << 40)


def longer(name: str, length: int, directory: Path) -> None:
    """A file that is longer than what vouches for it says."""
    forge(directory, 5)
    os.truncate(directory / name, length)


def stated(directory: Path) -> None:
    """The longest manifest that there may be: a hole, under the right digest."""
    forge(directory, 5)
    sign(directory, bytes(512 << 20))
    os.truncate(directory / "rank-00000.json", 0)
    os.truncate(directory / "rank-00000.json", 512 << 20)


ATTACKS = {
    "data": Attack(data, None),
    "data too long": Attack(partial(longer, "rank-00000.data", 1 << 40), "IntegrityError"),
    "manifest of 1 GiB": Attack(partial(longer, "rank-00000.json", 1 << 30), "IntegrityError"),
    "manifest of 500 MiB": Attack(partial(longer, "rank-00000.json", 500 << 20), "IntegrityError"),
    "manifest of 1 TiB": Attack(partial(longer, "rank-00000.json", 1 << 40), "IntegrityError"),
    "manifest of 512 MiB that is stated": Attack(stated, megabytes=600),
    "checkpoint.json of 1 TiB": Attack(partial(longer, "checkpoint.json", 1 << 40)),
    "checkpoint.json of 16 MiB": Attack(
        partial(longer, "checkpoint.json", 16 << 20), "IntegrityError"
    ),
}
