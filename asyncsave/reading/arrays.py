"""Arrays: a checkpoint's values without torch: tensors as NumPy arrays.

Leaves whose addresses overlap become views of one new memory, so what was tied is tied again.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, LoadError
from ..format.build import IMPOSSIBLE, unflatten
from ..format.dtypes import DTYPES
from ..format.manifest import TensorRecord, extent_bytes
from ..format.names import refuse_unused
from ..format.select import select
from ..format.tree import Node, Values, bulk_indices, numpy_dtype
from ..pages import Bytes
from ..storage.filesystem import FileSystem
from .checkpoint import Checkpoint, Run
from .groups import grouped
from .newest import first_sound

_VALUES = Values(size=tuple, dtype="torch.{}".format, device=str)
"""For what is torch's own: tuples, and names as torch's."""


def load_arrays(filesystem: FileSystem, path: Path, keys: str | Sequence[str] | None) -> Any:
    """Return the state of the newest sound checkpoint at ``path``, with arrays for tensors.

    Args:
        keys: globs of fqns; None for all.

    Raises:
        MismatchError: a key names nothing.
        ConfigError: a dtype needs ml_dtypes, which is not there.
        LoadError: see `first_sound`.
    """

    def use(checkpoint: Checkpoint) -> Any:
        tree: Node = checkpoint.rank.tree
        if keys is not None:
            tree, unused = select(tree, keys)
            refuse_unused(checkpoint.path, checkpoint.rank.tree, unused, "keys")
        bulk = _read(checkpoint, sorted(set(bulk_indices(tree))))
        return unflatten(tree, bulk.__getitem__, _VALUES)

    return first_sound(filesystem, path, use)


def _read(checkpoint: Checkpoint, indices: Sequence[int]) -> dict[int, Any]:
    """Return leaves, by index."""
    tensors = checkpoint.rank.tensors
    dtypes = {i: _dtype(tensors[i]) for i in indices}  # refused before a byte is read
    groups = grouped(tensors, indices)
    memories = [_memory(group.pad + group.stop - group.start) for group in groups]
    checkpoint.read(
        [
            Run(group.start, group.stop - group.start, memory[group.pad :])
            for group, memory in zip(groups, memories, strict=True)
        ]
    )
    bulk = {}
    for group, memory in zip(groups, memories, strict=True):
        for i in group.members:
            offset = group.pad + tensors[i].shards[0].start - group.start
            bulk[i] = _value(memory, offset, tensors[i], dtypes[i])
    return bulk


def _memory(nbytes: int) -> Bytes:
    try:
        return np.empty(nbytes, np.uint8)
    except MemoryError as cause:
        raise LoadError(f"there is no memory for an array of {nbytes} bytes: {cause}") from cause


def _value(memory: Bytes, offset: int, record: TensorRecord, dtype: np.dtype[Any]) -> Any:
    raw = memory[offset : offset + extent_bytes(record)]
    if record.kind == "bytes":
        return raw.tobytes()
    try:
        if raw.size == 0:
            return np.empty(record.shape, dtype)
        strides = record.shards[0].strides
        if strides is None:
            return raw.view(dtype).reshape(record.shape)
        # one element has no next one: its step may be any number, also beyond what NumPy takes
        steps = [
            step * dtype.itemsize if size > 1 else 0
            for size, step in zip(record.shape, strides, strict=True)
        ]
        return np.ndarray(record.shape, dtype, raw, strides=steps)  # which checks bounds
    except IMPOSSIBLE as cause:
        raise LoadError(
            f"{record.name!r:.80} has the shape {record.shape}, which NumPy cannot have: {cause}"
        ) from cause


def _dtype(record: TensorRecord) -> np.dtype[Any]:
    """Return NumPy's dtype of a leaf's elements; unsigned integers for what NumPy has none for.

    Raises:
        ConfigError: ml_dtypes has it, and is not there.
    """
    if record.kind == "numpy":
        return numpy_dtype(record.dtype)
    known = DTYPES[record.dtype]
    if known.numpy:
        return np.dtype("<" + known.numpy)
    if known.ml_dtypes:
        try:
            module = importlib.import_module("ml_dtypes")
            dtype: np.dtype[Any] = np.dtype(getattr(module, known.ml_dtypes))
        except (ImportError, AttributeError) as cause:
            raise ConfigError(
                f"{record.name!r:.80} has dtype {record.dtype}, which NumPy knows through the "
                "package ml_dtypes alone: pip install ml_dtypes"
            ) from cause
        return dtype
    return np.dtype(f"<u{known.nbytes}")
