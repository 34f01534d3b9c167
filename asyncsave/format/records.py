"""Records: those of a checkpoint's two JSON files, and their bytes.

``checkpoint.json`` holds a `CheckpointRecord`, ``rank-NNNNN.json`` a `RankRecord`; FORMAT.md is
their specification. What is decoded here is of the right types and no more: checked.py says what
may be believed. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import xxhash

from ..errors import FormatError, LoadError, StateError
from .files import FORMAT, MAX_CHECKPOINT_BYTES, MAX_RANK_BYTES, rank_file
from .lineage import NO_LINEAGE, Lineage
from .tree import Node

_T = TypeVar("_T")


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class ShardRecord(_Record, frozen=True, gc=False):
    """The piece of a tensor that this rank holds.

    ``start`` is the address of its first element in the rank's address space; ``strides``
    (elements) is absent when elements lie in row-major order; ``offsets`` and ``shape`` are absent
    when the shard is the whole tensor.
    """

    start: int
    strides: list[int] | None = None
    offsets: list[int] | None = None
    shape: list[int] | None = None


class TensorRecord(_Record, frozen=True, gc=False):
    name: str
    dtype: str
    shape: list[int]
    shards: list[ShardRecord]
    kind: str = "torch"
    requires_grad: bool = False
    parameter: bool = False


class ChunkRecord(_Record, frozen=True, gc=False):
    """``xxh3_128`` is of the stored bytes, ``raw_xxh3_128`` of what they decode to."""

    offset: int
    length: int
    raw_length: int
    coding: str
    parts: list[int]
    xxh3_128: str
    raw_xxh3_128: str
    file: int = 0


class FileRecord(_Record, frozen=True):
    """A data file. A ``linked`` one is an earlier checkpoint's, too, and may hold other frames."""

    name: str
    length: int
    linked: bool = False


class RankRecord(_Record, frozen=True):
    format: int
    rank: int
    files: list[FileRecord]
    chunks: list[ChunkRecord]
    tensors: list[TensorRecord]
    tree: Node


class EntryRecord(_Record, frozen=True):
    """A file that ``checkpoint.json`` vouches for: a rank's manifest, or a sidecar."""

    file: str
    length: int
    xxh3_128: str


class RankEntryRecord(EntryRecord, frozen=True):
    """A rank's manifest, and how long its data is, so that it need not be read to be listed.

    ``own`` is the length of its own data files, ``shared`` that of the frames in linked ones.
    """

    own: int | None = None
    shared: int = 0


class FormatRecord(_Record, frozen=True):
    """What ``checkpoint.json`` has in every format."""

    format: int


class CheckpointRecord(_Record, frozen=True):
    format: int
    step: int | None
    world_size: int
    time: str
    versions: dict[str, str]
    metrics: dict[str, float | None]
    metadata: object
    ranks: list[RankEntryRecord]
    lineage: Lineage = NO_LINEAGE
    files: list[EntryRecord] = []


# -- into bytes -------------------------------------------------------------------------------

_PREFIX = b'{"xxh3_128":"'
_DIGEST_END = len(_PREFIX) + 32


def digest(*pieces: bytes | bytearray | memoryview) -> str:
    """Return the xxh3-128 of bytes, end to end, as 32 lower-case hexadecimal digits."""
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def encode_rank(record: RankRecord) -> bytes:
    """Return the bytes of ``rank-NNNNN.json``.

    Raises:
        StateError: the tree is too large; plain values belong into arrays then.
    """
    data = msgspec.json.encode(record)
    if len(data) > MAX_RANK_BYTES:
        raise StateError(
            f"the state's plain values and names take {len(data)} bytes of manifest, more than "
            f"{MAX_RANK_BYTES}; put long lists of numbers into arrays or tensors"
        )
    return data


def encode_checkpoint(record: CheckpointRecord) -> bytes:
    """Return the bytes of ``checkpoint.json``: one JSON object whose first member is the digest of
    all bytes that follow the digest itself.
    """
    body = msgspec.json.encode(record)
    rest = b'",' + body[1:]
    if len(rest) > MAX_CHECKPOINT_BYTES - _DIGEST_END:
        raise StateError(f"metadata and metrics take {len(rest)} bytes; keep them under 16 MiB")
    return _PREFIX + digest(rest).encode() + rest


def entry(name: str, data: bytes) -> EntryRecord:
    """Return what ``checkpoint.json`` says of a file with these bytes."""
    return EntryRecord(file=name, length=len(data), xxh3_128=digest(data))


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself in ``checkpoint.json``; FORMAT.md has the members."""

    step: int | None
    lineage: Lineage
    metrics: dict[str, float | None]
    metadata: object
    time: str
    versions: dict[str, str]
    files: Mapping[str, bytes]


def encode_manifests(
    *,
    tree: Node,
    tensors: list[TensorRecord],
    chunks: list[ChunkRecord],
    files: list[FileRecord],
    about: About,
) -> tuple[bytes, bytes]:
    """Return the bytes of ``rank-00000.json`` and ``checkpoint.json`` of a save by one process.

    Args:
        files: the data files.

    Raises:
        StateError: they are longer than a reader takes.
    """
    rank_bytes = encode_rank(
        RankRecord(format=FORMAT, rank=0, files=files, chunks=chunks, tensors=tensors, tree=tree)
    )
    linked = {i for i, file in enumerate(files) if file.linked}
    rank = RankEntryRecord(
        file=rank_file(0),
        length=len(rank_bytes),
        xxh3_128=digest(rank_bytes),
        own=sum(file.length for file in files if not file.linked),
        shared=sum(chunk.length for chunk in chunks if chunk.file in linked),
    )
    checkpoint_bytes = encode_checkpoint(
        CheckpointRecord(
            format=FORMAT,
            step=about.step,
            world_size=1,
            time=about.time,
            versions=about.versions,
            metrics=about.metrics,
            metadata=about.metadata,
            ranks=[rank],
            lineage=about.lineage,
            files=[entry(name, data) for name, data in about.files.items()],
        )
    )
    return rank_bytes, checkpoint_bytes


# -- out of bytes -----------------------------------------------------------------------------


def has_its_digest(data: bytes | bytearray) -> bool:
    """Whether the bytes of a ``checkpoint.json`` begin with the digest of all that follows it."""
    stated = data[len(_PREFIX) : _DIGEST_END]
    rest = memoryview(data)[_DIGEST_END:]
    return data[: len(_PREFIX)] == _PREFIX and digest(rest).encode() == stated


def decode(data: bytes | bytearray, kind: type[_T], path: object) -> _T:
    """Return the record of a kind that is in the bytes of a file.

    Args:
        path: the file, for errors.

    Raises:
        FormatError: they are not JSON, or not of this kind.
        LoadError: there is no memory for it.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except MemoryError as cause:
        raise LoadError(f"there is no memory for the records in {path}") from cause
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as cause:
        raise FormatError(f"{path} is not a manifest of asyncsave: {cause}") from cause


# What msgspec must know of a kind it finds out when it is first asked, and two threads that ask at
# the same time crash the process. Modules are imported by one.
for _kind in (FormatRecord, CheckpointRecord, RankRecord):
    msgspec.json.Decoder(_kind)
