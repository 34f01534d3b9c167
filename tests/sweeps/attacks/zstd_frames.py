"""zstd frames that say one thing and hold another, or that ask for memory."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import zstandard

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = struct.pack("<II", 0x184D2A50, 8) + b"whatever"
CONTENT = b"a" * 5000


def run(length: int, last: bool = True) -> bytes:
    """Return a block that stands for so many times one byte."""
    return (length << 3 | 1 << 1 | last).to_bytes(3, "little") + b"a"


def frame(
    promise: int, *blocks: bytes, window: int | None = None, dictionary: bytes = b""
) -> bytes:
    """Return a frame that promises a length; ``window`` is the logarithm of its window."""
    flags = 0x80 | (0x20 if window is None else 0) | len(dictionary)
    size = b"" if window is None else bytes([(window - 10) << 3])
    return (
        MAGIC + bytes([flags]) + size + dictionary + struct.pack("<I", promise) + b"".join(blocks)
    )


GOOD = frame(5000, run(5000))
UNKNOWN_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT)
WITH_CHECKSUM = zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT)

FRAMES = {
    "promises less than the plane": frame(4999, run(5000)),
    "promises more than the plane": frame(5001, run(5000)),
    "promises 4 GiB": frame(2**32 - 1, run(5000)),
    "delivers too little": frame(5000, run(4999)),
    "delivers too much": frame(5000, run(100_000)),
    "delivers far too much": frame(5000, *[run(100_000, False)] * 1000, run(1)),
    "delivers nothing": frame(5000, run(0)),
    "does not say": UNKNOWN_SIZE,
    "window of 2 GiB": frame(5000, run(5000), window=31),
    "window of 2^41": frame(5000, run(5000), window=41),
    "wants a dictionary": frame(5000, run(5000), dictionary=b"\x07"),
    "two frames": frame(2500, run(2500)) * 2,
    "a frame and an empty one": GOOD + frame(0, run(0)),
    "a frame and a skippable one": GOOD + SKIPPABLE,
    "skippable frame first": SKIPPABLE + GOOD,
    "skippable frame alone": SKIPPABLE,
    "something behind it": GOOD + b"\0",
    "cut": GOOD[:-1],
    "only a magic number": MAGIC,
    "not zstd": b"BZh91AY&SY" * 3,
    "empty": b"",
    "no last block": frame(5000, run(5000, False)),
    "reserved block": frame(5000, (8 << 3 | 3 << 1 | 1).to_bytes(3, "little") + bytes(8)),
    "block longer than blocks are": frame(5000, (1_000_000 << 3 | 1).to_bytes(3, "little")),
    "wrong checksum": WITH_CHECKSUM[:-1] + bytes([WITH_CHECKSUM[-1] ^ 1]),
    "broken literals": frame(5000, (8 << 3 | 2 << 1 | 1).to_bytes(3, "little") + b"\xff" * 8),
}


def build(stored: bytes, directory: Path) -> None:
    chunks = [chunk(stored, CONTENT)]
    forge(directory, TENSOR, tensors=[tensor((5000,))], chunks=chunks, data=padded(stored))


def other_bytes(directory: Path) -> None:
    """A sound frame, of other bytes than the digest says."""
    stored = frame(5000, run(5000))
    chunks = [chunk(stored, b"b" * 5000)]
    forge(directory, TENSOR, tensors=[tensor((5000,))], chunks=chunks, data=padded(stored))


ATTACKS = {
    **{
        name: Attack(partial(build, stored), "IntegrityError" if stored else "FormatError")
        for name, stored in FRAMES.items()
    },
    "other bytes": Attack(other_bytes, "IntegrityError", says="do not have the checksum"),
    "a sound one": Attack(partial(build, GOOD), None),
    "a sound one with a window": Attack(partial(build, frame(5000, run(5000), window=23)), None),
    "a sound one with a checksum": Attack(partial(build, WITH_CHECKSUM), None),
}
