"""Forge: any records at all, signed as if asyncsave had written them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

ALIGNMENT = 4096
TENSOR = {"t": "tensor", "i": 0}

Json = dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """A hostile checkpoint, and what may come of it.

    Attributes:
        build: makes it in a directory that does not exist yet.
        raises: the name of the error that `asyncsave.load` must raise; None: it loads, at no more
            than the cost below.
        says: what that error's text must contain.
        megabytes: most memory that reading it may take.
        seconds: most CPU time that each way of reading it may take; what only waits is killed after
            a minute.
    """

    build: Callable[[Path], None]
    raises: str | None = "FormatError"
    says: str = ""
    megabytes: int = 64
    seconds: float = 4.0


def digest(data: bytes) -> str:
    """Return what the format calls a digest."""
    return xxhash.xxh3_128_hexdigest(data)


def tensor(shape: Sequence[int] = (4,), start: int = 0, dtype: str = "uint8", **more: Any) -> Json:
    """Return the record of a tensor, named ``x`` unless ``more`` says otherwise."""
    shard = {"start": start} | {key: more.pop(key) for key in ("strides",) if key in more}
    return {"name": "x", "dtype": dtype, "shape": list(shape), "shards": [shard]} | more


def chunk(stored: bytes, raw: bytes | None = None, offset: int = 0, **more: Any) -> Json:
    """Return the record of a chunk; ``raw`` is what ``stored`` decodes to, if that is another."""
    raw = stored if raw is None else raw
    return {
        "offset": offset,
        "length": len(stored),
        "raw_length": len(raw),
        "coding": "raw" if raw is stored else "zstd",
        "parts": [len(stored)],
        "xxh3_128": digest(stored),
        "raw_xxh3_128": digest(raw),
    } | more


def padded(*frames: bytes) -> bytes:
    """Return frames as a data file has them."""
    return b"".join(frame + bytes(-len(frame) % ALIGNMENT) for frame in frames)


def forge(
    directory: Path,
    tree: Any = None,
    *,
    tensors: Sequence[Json] = (),
    chunks: Sequence[Json] = (),
    data: bytes = b"",
    rank: Json | None = None,
    checkpoint: Json | None = None,
) -> None:
    """Write a checkpoint of these records; ``rank`` and ``checkpoint`` replace members."""
    files = [{"name": "rank-00000.data", "length": len(data)}]
    record: Json = {"format": 1, "rank": 0, "files": files, "chunks": chunks, "tensors": tensors}
    record |= {"tree": tree} | (rank or {})
    forge_text(directory, json.dumps(record), data, checkpoint)


def forge_text(
    directory: Path, rank: str | bytes, data: bytes = b"", checkpoint: Json | None = None
) -> None:
    """Write a checkpoint whose rank manifest is this text."""
    text = rank.encode() if isinstance(rank, str) else rank
    directory.mkdir(parents=True)
    (directory / "rank-00000.data").write_bytes(data)
    (directory / "rank-00000.json").write_bytes(text)
    sign(directory, text, checkpoint)


def sign(directory: Path, rank: bytes, checkpoint: Json | None = None) -> None:
    """Write the ``checkpoint.json`` that vouches for this rank manifest."""
    entry = {"file": "rank-00000.json", "length": len(rank), "xxh3_128": digest(rank)}
    record: Json = {"format": 1, "step": None, "world_size": 1, "time": "", "versions": {}}
    record |= {"metrics": {}, "metadata": None, "ranks": [entry]}
    sign_text(directory, json.dumps(record | (checkpoint or {})))


def sign_text(directory: Path, record: str) -> None:
    """Write a ``checkpoint.json``: this object, with its digest put in front."""
    rest = b'",' + record.encode()[1:]
    text = b'{"xxh3_128":"' + digest(rest).encode() + rest
    (directory / "checkpoint.json").write_bytes(text)


def tree_text(tree: str, rest: str = "") -> str:
    """Return a rank manifest without tensors whose tree, and what follows it, is this text."""
    return (
        '{"format":1,"rank":0,"files":[{"name":"rank-00000.data","length":0}],'
        f'"chunks":[],"tensors":[],"tree":{tree}{rest}}}'
    )
