"""Numbers that promise more than there is: ranks, lengths, chunks, tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, digest, forge, padded, tensor

DATA = b"abcd"


def checkpoint(members: dict[str, Any], directory: Path) -> None:
    forge(directory, checkpoint=members)


def entry(members: dict[str, Any], directory: Path) -> None:
    base = {"file": "rank-00000.json", "length": 1, "xxh3_128": "0" * 32}
    forge(directory, checkpoint={"ranks": [base | members]})


def rank(members: dict[str, Any], directory: Path) -> None:
    forge(directory, rank=members)


def many_ranks(directory: Path) -> None:
    ranks = [
        {"file": f"rank-{i:05d}.json", "length": 1, "xxh3_128": "0" * 32} for i in range(100_000)
    ]
    forge(directory, checkpoint={"world_size": 100_000, "ranks": ranks})


def file_length(length: int, directory: Path) -> None:
    forge(directory, rank={"files": [{"name": "rank-00000.data", "length": length}]})


def digest_text(text: str, directory: Path) -> None:
    record = chunk(DATA) | {"raw_xxh3_128": text}
    forge(directory, TENSOR, tensors=[tensor()], chunks=[record], data=padded(DATA))


ATTACKS = {
    "no rank": Attack(partial(checkpoint, {"ranks": []}), says="world size"),
    "no rank, and so it says": Attack(partial(checkpoint, {"ranks": [], "world_size": 0})),
    "a billion ranks": Attack(partial(checkpoint, {"world_size": 10**9}), says="world size"),
    "2^64 ranks": Attack(partial(checkpoint, {"world_size": 2**64}), says="world size"),
    "minus one rank": Attack(partial(checkpoint, {"world_size": -1}), says="world size"),
    "a hundred thousand ranks": Attack(many_ranks, "UnsupportedVersionError", seconds=8),
    "negative step": Attack(partial(checkpoint, {"step": -1}), says="step"),
    "format 10^300": Attack(partial(checkpoint, {"format": 10**300}), "UnsupportedVersionError"),
    "format -1": Attack(partial(checkpoint, {"format": -1}), "UnsupportedVersionError"),
    "format true": Attack(partial(checkpoint, {"format": True})),
    "format absent": Attack(partial(checkpoint, {"format": None})),
    "manifest of no length": Attack(partial(entry, {"length": 0}), says="length of rank 0"),
    "manifest of 2^62": Attack(partial(entry, {"length": 2**62}), says="length of rank 0"),
    "manifest of other length": Attack(partial(entry, {"length": 2}), "IntegrityError"),
    "digest that is none": Attack(partial(entry, {"xxh3_128": "../../etc/passwd"})),
    "digest in capitals": Attack(partial(entry, {"xxh3_128": "A" * 32})),
    "digest with a newline": Attack(partial(entry, {"xxh3_128": "0" * 32 + "\n"})),
    "rank of other format": Attack(partial(rank, {"format": 2})),
    "rank 1": Attack(partial(rank, {"rank": 1})),
    "rank 10^300": Attack(partial(rank, {"rank": 10**300})),
    "data of 2^62": Attack(partial(file_length, 2**62), "IntegrityError", says="bytes long"),
    "data of 2^63": Attack(partial(file_length, 2**63)),
    "data of -1": Attack(partial(file_length, -1)),
    "chunks are a number": Attack(partial(rank, {"chunks": 10**9})),
    "tensors are a number": Attack(partial(rank, {"tensors": 10**9})),
    "two digests that differ": Attack(partial(digest_text, digest(b"")), "IntegrityError"),
}
