"""Chunks that overlap, lie outside of the file, or do not add up."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

DATA = b"abcd" * 25

CHANGES: dict[str, dict[str, Any]] = {
    "beyond the file": {"offset": 8192},
    "offset 2^62": {"offset": 2**62},
    "offset 2^64": {"offset": 2**64},
    "negative offset": {"offset": -4096},
    "not aligned": {"offset": 8},
    "other file": {"file": 1},
    "file -1": {"file": -1},
    "longer than its parts": {"length": 101},
    "length 2^62": {"length": 2**62, "parts": [2**62]},
    "negative length": {"length": -100, "parts": [-100]},
    "raw length 0": {"raw_length": 0},
    "raw length negative": {"raw_length": -100},
    "raw length 2^30 + 1": {"raw_length": 2**30 + 1},
    "raw length 2^62": {"raw_length": 2**62},
    "raw that grows": {"raw_length": 101},
    "no parts": {"parts": []},
    "too many parts": {"parts": [50, 50]},
    "a million parts": {"parts": [0] * 1_000_000},
    "part longer than its plane": {"coding": "zstd", "raw_length": 99},
    "empty part": {"coding": "bytes2", "parts": [100, 0]},
    "parts that cancel out": {"coding": "bytes2", "parts": [150, -50]},
    "half an element": {"coding": "bytes8"},
    "unknown coding": {"coding": "pickle"},
    "coding of the future": {"coding": "exp16.16"},
    "coding with a sign": {"coding": "exp16.-1"},
    "coding with a zero": {"coding": "exp16.01"},
    "bytes0": {"coding": "bytes0"},
    "bytes3": {"coding": "bytes3"},
    "coding is long": {"coding": "x" * 100_000},
}


def build(changes: dict[str, Any], directory: Path) -> None:
    record = chunk(DATA) | changes
    tensors = [tensor((100,))]
    forge(directory, TENSOR, tensors=tensors, chunks=[record], data=padded(DATA))


def twice(directory: Path) -> None:
    """The same frame twice, so that a file decodes to more than it holds."""
    forge(directory, TENSOR, tensors=[tensor((200,))], chunks=[chunk(DATA)] * 2, data=padded(DATA))


def overlapping(directory: Path) -> None:
    """A frame of two pages, and one that begins in its second page."""
    data = bytes(8192)
    chunks = [chunk(data), chunk(data[4096:], offset=4096)]
    forge(directory, TENSOR, tensors=[tensor((4,))], chunks=chunks, data=data)


ATTACKS = {
    **{name: Attack(partial(build, changes)) for name, changes in CHANGES.items()},
    "one frame, two chunks": Attack(twice, says="overlap"),
    "frames that overlap": Attack(overlapping, says="overlap"),
}
