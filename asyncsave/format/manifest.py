"""Manifest: the records of a checkpoint, their bytes, and the one place where they are believed.

``checkpoint.json`` holds a `CheckpointRecord`, ``rank-NNNNN.json`` a `RankRecord`; FORMAT.md is
their specification. `decode_checkpoint` and `decode_rank` are the only ways in: what they return
has been checked for everything a reader relies on, before a byte of tensor data is allocated. Pure:
no threads, no files, no clock.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import TypeVar

import msgspec
import xxhash

from ..errors import FormatError, IntegrityError, LoadError, StateError, UnsupportedVersionError
from .codings import plane_lengths
from .dtypes import DTYPES
from .lineage import NO_LINEAGE, Lineage
from .tree import Node, numpy_dtype
from .validate import validate_tree

FORMAT = 1
CHECKPOINT_FILE = "checkpoint.json"
FRAME_ALIGNMENT = 4096
MAX_CHECKPOINT_BYTES = 16 << 20
MAX_RANK_BYTES = 512 << 20
MAX_CHUNK_BYTES = 1 << 30
MAX_DIMS = 64
_MAX_BYTES = 1 << 62
_HEX = re.compile(r"[0-9a-f]{32}")

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
    name: str
    length: int


class RankRecord(_Record, frozen=True):
    format: int
    rank: int
    files: list[FileRecord]
    chunks: list[ChunkRecord]
    tensors: list[TensorRecord]
    tree: Node


class RankFileRecord(_Record, frozen=True):
    file: str
    length: int
    xxh3_128: str


class CheckpointRecord(_Record, frozen=True):
    format: int
    step: int | None
    world_size: int
    time: str
    versions: dict[str, str]
    metrics: dict[str, float | None]
    metadata: object
    ranks: list[RankFileRecord]
    lineage: Lineage = NO_LINEAGE


def rank_file(rank: int) -> str:
    """Return the name of a rank's manifest."""
    return f"rank-{rank:05d}.json"


def data_file(rank: int) -> str:
    """Return the name of a rank's data file."""
    return f"rank-{rank:05d}.data"


# -- bytes ------------------------------------------------------------------------------------

_PREFIX = b'{"xxh3_128":"'
_DIGEST_END = len(_PREFIX) + 32


def digest(data: bytes | bytearray | memoryview) -> str:
    """Return the xxh3-128 of ``data`` as 32 lower-case hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


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


def encode_manifests(
    *,
    tree: Node,
    tensors: list[TensorRecord],
    chunks: list[ChunkRecord],
    data_bytes: int,
    step: int | None,
    lineage: Lineage,
    metrics: dict[str, float | None],
    metadata: object,
    time: str,
    versions: dict[str, str],
) -> tuple[bytes, bytes]:
    """Return the bytes of ``rank-00000.json`` and ``checkpoint.json`` of a save by one process."""
    files = [FileRecord(name=data_file(0), length=data_bytes)]
    rank_bytes = encode_rank(
        RankRecord(format=FORMAT, rank=0, files=files, chunks=chunks, tensors=tensors, tree=tree)
    )
    rank = RankFileRecord(file=rank_file(0), length=len(rank_bytes), xxh3_128=digest(rank_bytes))
    checkpoint_bytes = encode_checkpoint(
        CheckpointRecord(
            format=FORMAT,
            step=step,
            world_size=1,
            time=time,
            versions=versions,
            metrics=metrics,
            metadata=metadata,
            ranks=[rank],
            lineage=lineage,
        )
    )
    return rank_bytes, checkpoint_bytes


def decode_checkpoint(data: bytes | bytearray, path: object) -> CheckpointRecord:
    """Return the validated record in the bytes of a ``checkpoint.json``.

    Raises:
        IntegrityError: its checksum is wrong.
        UnsupportedVersionError: it is sound, and of a newer format.
        FormatError: it contradicts itself.
    """
    rest = memoryview(data)[_DIGEST_END:]
    stated = data[len(_PREFIX) : _DIGEST_END]
    if data[: len(_PREFIX)] != _PREFIX or digest(rest).encode() != stated:
        raise IntegrityError(
            f"{path} is damaged: its bytes do not have the checksum that it begins with",
            path=path,  # type: ignore[arg-type]
            offset=0,
        )
    version = _decode(data, _Version, path).format
    if version != FORMAT:
        raise UnsupportedVersionError(
            f"{path} is in format {version}, this asyncsave reads {FORMAT}: install a newer one"
        )
    record = _decode(data, CheckpointRecord, path)
    _require(record.world_size >= 1 and len(record.ranks) == record.world_size, path, "world size")
    _require(record.step is None or record.step >= 0, path, "step")
    _require(record.lineage.is_possible, path, "lineage")
    for rank, entry in enumerate(record.ranks):
        _require(entry.file == rank_file(rank), path, f"name of rank {rank}'s manifest")
        _require(0 < entry.length <= MAX_RANK_BYTES, path, f"length of rank {rank}'s manifest")
        _require(_HEX.fullmatch(entry.xxh3_128) is not None, path, "checksum")
    if record.world_size != 1:
        raise UnsupportedVersionError(
            f"{path} was written by {record.world_size} ranks; this asyncsave reads one"
        )
    return record


def decode_rank(data: bytes | bytearray, entry: RankFileRecord, path: object) -> RankRecord:
    """Return the validated record in the bytes of a rank manifest.

    Raises:
        IntegrityError: the bytes are not those that ``entry`` describes.
        FormatError: the record contradicts itself.
    """
    if len(data) != entry.length or digest(data) != entry.xxh3_128:
        raise IntegrityError(
            f"{path} is damaged: it is not the file that {CHECKPOINT_FILE} describes",
            path=path,  # type: ignore[arg-type]
            offset=0,
        )
    record = _decode(data, RankRecord, path)
    _validate_rank(record, path)
    return record


class _Version(msgspec.Struct):
    format: int


def _decode(data: bytes | bytearray, kind: type[_T], path: object) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except MemoryError as cause:
        raise LoadError(f"there is no memory for the records in {path}") from cause
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as cause:
        raise FormatError(f"{path} is not a manifest of asyncsave: {cause}") from cause


def _require(condition: bool, path: object, what: str) -> None:
    if not condition:
        raise FormatError(f"{path} contradicts itself: the {what} cannot be right")


def _validate_rank(record: RankRecord, path: object) -> None:
    _require(record.format == FORMAT, path, "format")
    _require(record.rank == 0, path, "rank")
    _require(len(record.files) == 1, path, "number of data files")
    for file in record.files:
        _require(file.name == data_file(record.rank), path, f"file name {file.name!r:.40}")
        _require(0 <= file.length <= _MAX_BYTES, path, f"length of {file.name}")
    _validate_chunks(record, path)
    total = sum(chunk.raw_length for chunk in record.chunks)
    for tensor in record.tensors:
        _validate_tensor(tensor, total, path)
    _validate_bytes(record, path)
    validate_tree(record.tree, len(record.tensors), path)


def _validate_chunks(record: RankRecord, path: object) -> None:
    for i, chunk in enumerate(record.chunks):
        _require(0 <= chunk.file < len(record.files), path, f"file of chunk {i}")
        _require(0 < chunk.raw_length <= MAX_CHUNK_BYTES, path, f"raw length of chunk {i}")
        try:
            planes = plane_lengths(chunk.coding, chunk.raw_length)
        except ValueError as cause:
            raise FormatError(f"{path}: chunk {i} has an impossible coding: {cause}") from cause
        fits = len(chunk.parts) == len(planes) and all(
            (part > 0 or plane == 0) and part <= plane
            for part, plane in zip(chunk.parts, planes, strict=True)
        )
        fits = fits and (chunk.coding != "raw" or chunk.parts == [chunk.raw_length])
        _require(fits and sum(chunk.parts) == chunk.length, path, f"parts of chunk {i}")
        digests = _HEX.fullmatch(chunk.xxh3_128) and _HEX.fullmatch(chunk.raw_xxh3_128)
        _require(digests is not None, path, f"checksum of chunk {i}")
        _require(chunk.offset >= 0 and chunk.offset % FRAME_ALIGNMENT == 0, path, f"offset of {i}")
    ends = [0] * len(record.files)
    for chunk in sorted(record.chunks, key=lambda chunk: chunk.offset):
        _require(chunk.offset >= ends[chunk.file], path, "order of the chunks, which overlap,")
        ends[chunk.file] = chunk.offset + chunk.length
    for file, end in zip(record.files, ends, strict=True):
        _require(end <= file.length, path, f"length of {file.name}, shorter than its chunks,")


def item_bytes(tensor: TensorRecord) -> int:
    """Return the element size of a record's dtype, in bytes.

    Raises:
        FormatError: the dtype is unknown.
    """
    if tensor.kind == "numpy":
        return numpy_dtype(tensor.dtype).itemsize
    known = DTYPES.get(tensor.dtype)
    if tensor.kind == "torch" and known is not None:
        return known.nbytes
    if tensor.kind == "bytes" and tensor.dtype == "uint8":
        return 1
    if tensor.kind == "torch" and tensor.dtype.isidentifier() and len(tensor.dtype) <= 40:
        raise UnsupportedVersionError(
            f"{tensor.name!r:.80} has dtype {tensor.dtype}, which this asyncsave does not know: "
            "install a newer one"
        )
    raise FormatError(
        f"{tensor.name!r:.80} has kind {tensor.kind!r:.20} and dtype {tensor.dtype!r:.40}, "
        "which do not go together"
    )


def extent_bytes(tensor: TensorRecord) -> int:
    """Return how many bytes of address space a (whole) tensor reaches over, from its start."""
    if 0 in tensor.shape:
        return 0
    width = item_bytes(tensor)
    strides = tensor.shards[0].strides
    if strides is None:
        return math.prod(tensor.shape) * width
    steps = zip(tensor.shape, strides, strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * width


def _validate_tensor(tensor: TensorRecord, total: int, path: object) -> None:
    def ensure(condition: bool) -> None:
        if not condition:  # a text for each of many records would take longer than all the rest
            _require(False, path, f"record of {tensor.name!r:.80}")

    width = item_bytes(tensor)
    ensure(width > 0 and len(tensor.shape) <= MAX_DIMS)
    ensure(all(0 <= size < _MAX_BYTES for size in tensor.shape))
    ensure(math.prod(tensor.shape) * width <= _MAX_BYTES)
    if tensor.kind == "numpy":  # which multiplies the other sizes though one is 0
        ensure(math.prod(size or 1 for size in tensor.shape) * width <= _MAX_BYTES)
    ensure(len(tensor.shards) == 1)
    shard = tensor.shards[0]
    if shard.strides is not None:
        fits = tensor.kind == "torch" and len(shard.strides) == len(tensor.shape)
        ensure(fits and all(0 <= step < _MAX_BYTES for step in shard.strides))
    zeros = [0] * len(tensor.shape)
    ensure(shard.offsets in (None, zeros) and shard.shape in (None, tensor.shape))
    ensure(shard.start >= 0 and shard.start + extent_bytes(tensor) <= total)
    if tensor.kind == "bytes":
        ensure(len(tensor.shape) == 1)
    if tensor.requires_grad or tensor.parameter:
        ensure(tensor.kind == "torch")
    if tensor.requires_grad:
        ensure(DTYPES[tensor.dtype].has_gradient)


def _validate_bytes(record: RankRecord, path: object) -> None:
    """Bytes values are copies: if they could overlap, few bytes would become very many."""
    ranges = {
        (tensor.shards[0].start, tensor.shards[0].start + extent_bytes(tensor))
        for tensor in record.tensors
        if tensor.kind == "bytes" and extent_bytes(tensor)
    }
    for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)):
        _require(start >= stop, path, "place of its bytes values, which overlap,")
