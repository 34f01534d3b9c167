"""Checked: the one place where the records of a checkpoint are believed.

`decode_checkpoint` and `decode_rank` are the only ways in. What they return has been checked for
everything that a reader relies on, before a byte of tensor data is allocated, and says all that was
found out by the way: tensors are `Leaf` records then. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..errors import FormatError, IntegrityError, UnsupportedVersionError
from .codings import plane_lengths
from .dtypes import DTYPES, Dtype, numpy_row
from .files import (
    CHECKPOINT_FILE,
    FORMAT,
    FRAME_ALIGNMENT,
    MAX_BYTES,
    MAX_CHUNK_BYTES,
    MAX_DIMS,
    MAX_FILES,
    MAX_RANK_BYTES,
    data_file,
    is_sidecar_name,
    linked_number,
    rank_file,
)
from .leaf import Leaf
from .records import (
    CheckpointRecord,
    ChunkRecord,
    EntryRecord,
    FileRecord,
    FormatRecord,
    RankRecord,
    TensorRecord,
    decode,
    digest,
    has_its_digest,
)
from .ties import overlapping, padding
from .tree import Node, bulk_and_made
from .validate import validate_tree

_HEX = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a rank has of a checkpoint.

    Attributes:
        rank: its number.
        files: its data files.
        chunks: its address space, in address order.
        leaves: its values with bulk, by the numbers that TensorNodes have.
        tree: the saved state.
    """

    rank: int
    files: list[FileRecord]
    chunks: list[ChunkRecord]
    leaves: list[Leaf]
    tree: Node


def decode_checkpoint(data: bytes | bytearray, path: object) -> CheckpointRecord:
    """Return the record in the bytes of a ``checkpoint.json``, checked.

    Raises:
        IntegrityError: its checksum is wrong.
        UnsupportedVersionError: it is sound, and of a newer format.
        FormatError: it contradicts itself.
    """
    if not has_its_digest(data):
        raise IntegrityError(
            f"{path} is damaged: its bytes do not have the checksum that it begins with",
            path=path,  # type: ignore[arg-type]
            offset=0,
        )
    version = decode(data, FormatRecord, path).format
    if version != FORMAT:
        raise UnsupportedVersionError(
            f"{path} is in format {version}, this asyncsave reads {FORMAT}: install a newer one"
        )
    record = decode(data, CheckpointRecord, path)
    _require(record.world_size >= 1 and len(record.ranks) == record.world_size, path, "world size")
    _require(record.step is None or record.step >= 0, path, "step")
    _require(record.lineage.is_possible, path, "lineage")
    for rank, entry in enumerate(record.ranks):
        data_bytes = (entry.own or 0, entry.shared)
        _require(all(0 <= each <= MAX_BYTES for each in data_bytes), path, "length of its data")
        _require(entry.file == rank_file(rank), path, f"name of rank {rank}'s manifest")
        _require(0 < entry.length <= MAX_RANK_BYTES, path, f"length of rank {rank}'s manifest")
        _require(_HEX.fullmatch(entry.xxh3_128) is not None, path, "checksum")
    for sidecar in record.files:
        _require(is_sidecar_name(sidecar.file), path, f"name of the file {sidecar.file!r:.40}")
        _require(0 <= sidecar.length <= MAX_BYTES, path, f"length of {sidecar.file}")
        _require(_HEX.fullmatch(sidecar.xxh3_128) is not None, path, "checksum")
    names = {sidecar.file.casefold() for sidecar in record.files}
    _require(len(names) == len(record.files), path, "list of files, which has one twice,")
    if record.world_size != 1:
        raise UnsupportedVersionError(
            f"{path} was written by {record.world_size} ranks; this asyncsave reads one"
        )
    return record


def decode_rank(data: bytes | bytearray, entry: EntryRecord, rank: int, path: object) -> Manifest:
    """Return what is in the bytes of a rank manifest, checked.

    Args:
        entry: what ``checkpoint.json`` says of it.
        rank: the number of its rank.
        path: the file, for errors.

    Raises:
        IntegrityError: the bytes are not those that ``entry`` describes.
        UnsupportedVersionError: it has a dtype that only a newer asyncsave knows.
        FormatError: it contradicts itself.
    """
    if len(data) != entry.length or digest(data) != entry.xxh3_128:
        raise IntegrityError(
            f"{path} is damaged: it is not the file that {CHECKPOINT_FILE} describes",
            path=path,  # type: ignore[arg-type]
            offset=0,
        )
    record = decode(data, RankRecord, path)
    _require(record.format == FORMAT, path, "format")
    _require(record.rank == rank, path, "rank")
    _check_files(record.files, rank, path)
    _check_chunks(record.chunks, record.files, path)
    leaves = _leaves(record, path)
    _check_ties(leaves, path)
    _check_bytes(leaves, path)
    validate_tree(record.tree, len(leaves), path)
    _check_made(record.tree, leaves, path)
    return Manifest(rank, record.files, record.chunks, leaves, record.tree)


def _require(condition: bool, path: object, what: str) -> None:
    if not condition:
        _refuse(path, what)


def _refuse(path: object, what: str) -> NoReturn:
    raise FormatError(f"{path} contradicts itself: the {what} cannot be right")


# -- chunks -----------------------------------------------------------------------------------


def _check_chunks(chunks: Sequence[ChunkRecord], files: Sequence[FileRecord], path: object) -> None:
    for i, chunk in enumerate(chunks):
        _require(0 <= chunk.file < len(files), path, f"file of chunk {i}")
        _require(0 < chunk.raw_length <= MAX_CHUNK_BYTES, path, f"raw length of chunk {i}")
        try:
            planes = plane_lengths(chunk.coding, chunk.raw_length)
        except ValueError as cause:
            raise FormatError(f"{path}: chunk {i} has an impossible coding: {cause}") from cause
        _require(_are_parts(chunk, planes), path, f"parts of chunk {i}")
        digests = _HEX.fullmatch(chunk.xxh3_128) and _HEX.fullmatch(chunk.raw_xxh3_128)
        _require(digests is not None, path, f"checksum of chunk {i}")
        _require(chunk.offset >= 0 and chunk.offset % FRAME_ALIGNMENT == 0, path, f"offset of {i}")
    _check_frames(chunks, files, path)


def _are_parts(chunk: ChunkRecord, planes: Sequence[int]) -> bool:
    """Whether a chunk's parts can be those of planes of these lengths."""
    parts = chunk.parts
    if len(parts) != len(planes) or sum(parts) != chunk.length:
        return False
    if chunk.coding == "raw":
        return parts == [chunk.raw_length]
    pairs = zip(parts, planes, strict=True)
    return all((part > 0 or plane == 0) and part <= plane for part, plane in pairs)


def _check_files(files: Sequence[FileRecord], rank: int, path: object) -> None:
    _require(0 < len(files) <= MAX_FILES, path, "number of data files")
    own, last = 0, -1
    for file in files:
        if file.linked:
            number = linked_number(rank, file.name)
            _require(number is not None and number > last, path, f"file name {file.name!r:.40}")
            last = number or 0
        else:
            _require(file.name == data_file(rank, own), path, f"file name {file.name!r:.40}")
            own += 1
        _require(0 <= file.length <= MAX_BYTES, path, f"length of {file.name}")


def _check_frames(chunks: Sequence[ChunkRecord], files: Sequence[FileRecord], path: object) -> None:
    ends = [0] * len(files)
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        _require(chunk.offset >= ends[chunk.file], path, "order of the chunks, which overlap,")
        ends[chunk.file] = chunk.offset + chunk.length
    for file, end in zip(files, ends, strict=True):
        _require(end <= file.length, path, f"length of {file.name}, shorter than its chunks,")


# -- leaves -----------------------------------------------------------------------------------


def _leaves(record: RankRecord, path: object) -> list[Leaf]:
    """Return all tensors of a manifest, each checked. HOT (per leaf)."""
    end = sum(chunk.raw_length for chunk in record.chunks)
    leaves = []
    for index, tensor in enumerate(record.tensors):
        dtype = _dtype(tensor)
        if not _is_sound(tensor, dtype):
            _refuse(path, f"record of {tensor.name!r:.80}")
        shape, shard = tensor.shape, tensor.shards[0]
        strides, start = shard.strides, shard.start
        count = math.prod(shape) if strides is None else _reach(shape, strides)
        stop = start + count * dtype.nbytes
        if start < 0 or stop > end:
            _refuse(path, f"record of {tensor.name!r:.80}")
        leaf = Leaf(
            index,
            tensor.name,
            tensor.kind,
            dtype,
            shape,
            strides,
            start,
            stop,
            tensor.requires_grad,
            tensor.parameter,
            record.rank,
        )
        leaves.append(leaf)
    return leaves


def _dtype(tensor: TensorRecord) -> Dtype:
    """Return the row of a record's dtype; UnsupportedVersionError, FormatError: there is none."""
    kind, name = tensor.kind, tensor.dtype
    if kind == "numpy":
        return numpy_row(name)
    row = DTYPES.get(name)
    if row is not None and (kind == "torch" or (kind == "bytes" and name == "uint8")):
        return row
    if kind == "torch" and name.isidentifier() and len(name) <= 40:
        raise UnsupportedVersionError(
            f"{tensor.name!r:.80} has dtype {name}, which this asyncsave does not know: "
            "install a newer one"
        )
    raise FormatError(
        f"{tensor.name!r:.80} has kind {kind!r:.20} and dtype {name!r:.40}, which do not go "
        "together"
    )


def _is_sound(tensor: TensorRecord, dtype: Dtype) -> bool:
    """Whether a record can be, wherever it lies. HOT (per leaf)."""
    kind, shape = tensor.kind, tensor.shape
    if len(tensor.shards) != 1 or not _is_shape(shape, kind, dtype):
        return False
    shard = tensor.shards[0]
    if shard.strides is not None and (kind != "torch" or not _are_strides(shard.strides, shape)):
        return False
    if shard.shape is not None and shard.shape != shape:  # many ranks have parts of tensors
        return False
    if shard.offsets is not None and shard.offsets != [0] * len(shape):
        return False
    if kind != "torch":
        return not (tensor.requires_grad or tensor.parameter)
    return not tensor.requires_grad or dtype.has_gradient


def _is_shape(shape: list[int], kind: str, dtype: Dtype) -> bool:
    if len(shape) > MAX_DIMS or (kind == "bytes" and len(shape) != 1):
        return False
    if not shape:
        return True
    if min(shape) < 0 or max(shape) >= MAX_BYTES:
        return False
    if 0 not in shape:
        return math.prod(shape) * dtype.nbytes <= MAX_BYTES
    if kind == "numpy":  # which multiplies the other sizes though one is 0
        return math.prod(size or 1 for size in shape) * dtype.nbytes <= MAX_BYTES
    # torch multiplies them in their order, in 64 bits
    return math.prod(shape[: shape.index(0)]) < 2**64


def _are_strides(strides: list[int], shape: list[int]) -> bool:
    if len(strides) != len(shape):
        return False
    return not strides or (min(strides) >= 0 and max(strides) < MAX_BYTES)


def _reach(shape: list[int], strides: list[int]) -> int:
    """Return how many elements lie from the first one to the last one; 0 if there is none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


_MOST_TIED = 16


def _check_made(tree: Node, leaves: Sequence[Leaf], path: object) -> None:
    """Refuse what cannot be made in time and memory that are proportional to the stored bytes.

    What is made of tensors copies them, or looks at each element: they must not repeat any, nor all
    be the same ones.
    """
    found, made = bulk_and_made(tree)
    _require(len(set(found)) == len(found), path, "tree, in which one tensor is twice,")
    for leaf in (leaves[i] for i in made):
        _require(
            math.prod(leaf.shape) * leaf.dtype.nbytes <= leaf.nbytes,
            path,
            f"strides of {leaf.name!r:.80}, of which something is made,",
        )
    made_bytes = sum(leaves[i].nbytes for i in made)
    end = max((leaf.stop for leaf in leaves), default=0)
    few = made_bytes <= _MOST_TIED * end
    _require(few, path, "number of values that are made of the same bytes")


def _check_ties(leaves: Iterable[Leaf], path: object) -> None:
    """Leaves that share memory must all be aligned in it, or nobody could make them anew."""
    some = sorted((leaf for leaf in leaves if leaf.nbytes), key=operator.attrgetter("start"))
    if all(one.stop <= other.start for one, other in itertools.pairwise(some)):
        return  # as in most checkpoints, and told in a third of the time
    for members in overlapping(some):
        if len(members) > 1 and padding(members) is None:
            raise FormatError(
                f"{path} has tensors that share memory and are not aligned to one another, "
                f"{members[0].name!r:.80} and {members[-1].name!r:.80} among them"
            )


def _check_bytes(leaves: Iterable[Leaf], path: object) -> None:
    """Bytes values are copies: if they could overlap, few bytes would become very many."""
    ranges = {(leaf.start, leaf.stop) for leaf in leaves if leaf.kind == "bytes" and leaf.nbytes}
    for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)):
        _require(start >= stop, path, "place of its bytes values, which overlap,")
