"""Few bytes that decode to many, or that take long to decode."""

from __future__ import annotations

import os
from pathlib import Path

from .forge import TENSOR, Attack, chunk, digest, forge, padded, tensor
from .zstd_frames import frame, run

CHUNK = 128 << 20


def zeros(directory: Path) -> None:
    """Eight chunks of 128 MiB, of which a reader needs four bytes."""
    stored = frame(CHUNK, *[run(1 << 17, False)] * (CHUNK >> 17), run(0))
    raw = b"a" * CHUNK
    record = chunk(stored, raw)
    step = len(padded(stored))
    chunks = [record | {"offset": i * step} for i in range(8)]
    tensors = [tensor((4,), CHUNK - 2)]
    forge(directory, TENSOR, tensors=tensors, chunks=chunks, data=padded(stored) * 8)


def empty_blocks(directory: Path) -> None:
    """A frame of 44 million empty blocks, which is a hole in a file."""
    head = frame(CHUNK)
    stored = head + bytes(CHUNK - 1 - len(head))
    record = chunk(stored, b"a" * CHUNK)
    rank = {"files": [{"name": "rank-00000.data", "length": CHUNK}]}
    forge(directory, TENSOR, tensors=[tensor()], chunks=[record], data=head, rank=rank)
    os.truncate(directory / "rank-00000.data", CHUNK)


def more_than_there_is(directory: Path) -> None:
    """A tensor of 64 GiB, which 2 MB decode to, where only 6 GiB can be had."""
    size = 1 << 30
    stored = frame(size, *[run(1 << 17, False)] * (size >> 17), run(0))
    record = chunk(stored, b"") | {"raw_length": size, "raw_xxh3_128": digest(b"")}
    step = len(padded(stored))
    chunks = [record | {"offset": i * step} for i in range(64)]
    tensors = [tensor((64 * size,))]
    forge(directory, TENSOR, tensors=tensors, chunks=chunks, data=padded(stored) * 64)


ATTACKS = {
    "zeros": Attack(zeros, None, megabytes=600, seconds=8),
    "empty blocks": Attack(empty_blocks, "IntegrityError", megabytes=300),
    "more than there is": Attack(more_than_there_is, "LoadError", says="memory", megabytes=1200),
}
