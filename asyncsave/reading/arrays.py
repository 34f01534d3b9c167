"""Arrays: a checkpoint's values without torch: tensors as NumPy arrays.

Leaves whose addresses overlap become views of one new memory, so what was tied is tied again.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, LoadError
from ..format.build import IMPOSSIBLE, unflatten
from ..format.leaf import Leaf
from ..format.names import refuse_unused
from ..format.select import completed, select
from ..format.tree import Node, Values, bulk_indices
from ..pages import Bytes
from ..storage.place import Place
from .checkpoint import Checkpoint
from .fill import Fill
from .groups import grouped
from .newest import first_sound, note_loaded

_VALUES = Values(
    size=tuple,
    dtype="torch.{}".format,
    device=str,
    made=lambda name, of, args: of,
    typed=lambda name, of: of,
)
"""For what is torch's own: tuples, names as torch's, and the arrays that tensors are made of."""


def load_arrays(place: Place, keys: str | Sequence[str] | None) -> Any:
    """Return the state of the newest sound checkpoint at ``place``, with arrays for tensors.

    Args:
        keys: globs of fqns; None for all.

    Raises:
        MismatchError: a key names nothing.
        ConfigError: a dtype needs ml_dtypes, which is not there.
        LoadError: see `first_sound`.
    """

    def use(checkpoint: Checkpoint) -> Any:
        tree: Node = checkpoint.tree
        if keys is not None:
            tree, unused = select(tree, keys)
            refuse_unused(checkpoint.path, checkpoint.tree, unused, "keys")
            tree = completed(tree)
        wanted = [checkpoint.leaves[i] for i in sorted(set(bulk_indices(tree)))]
        bulk = _read(checkpoint, wanted)
        state = unflatten(tree, bulk.__getitem__, _VALUES)
        note_loaded(checkpoint)
        return state

    return first_sound(place, use)


def _read(checkpoint: Checkpoint, leaves: Sequence[Leaf]) -> dict[int, Any]:
    """Return the values of leaves, by index."""
    dtypes = {leaf.index: _dtype(leaf) for leaf in leaves}  # refused before a byte is read
    groups = grouped(leaves)
    memories = [_memory(group.pad + group.nbytes) for group in groups]
    pairs = list(zip(groups, memories, strict=True))
    checkpoint.read(
        [
            Fill(group.start, group.nbytes, memory[group.pad :], rank=group.rank)
            for group, memory in pairs
        ]
    )
    bulk: dict[int, Any] = {}
    for group, memory in pairs:
        texts: dict[int, bytes] = {}  # bytes with the same start are the same, and one object does
        for leaf in group.members:
            offset = group.pad + leaf.start - group.start
            if leaf.kind != "bytes":
                bulk[leaf.index] = _array(memory, offset, leaf, dtypes[leaf.index])
                continue
            if offset not in texts:
                texts[offset] = memory[offset : offset + leaf.nbytes].tobytes()
            bulk[leaf.index] = texts[offset]
    return bulk


def _memory(nbytes: int) -> Bytes:
    try:
        return np.empty(nbytes, np.uint8)
    except MemoryError as cause:
        raise LoadError(f"there is no memory for an array of {nbytes} bytes: {cause}") from cause


def _array(memory: Bytes, offset: int, leaf: Leaf, dtype: np.dtype[Any]) -> Any:
    """Return the array of a leaf, whose first byte is at ``offset`` in ``memory``."""
    raw = memory[offset : offset + leaf.nbytes]
    try:
        if raw.size == 0:
            return np.empty(leaf.shape, dtype)
        if leaf.strides is None:
            return raw.view(dtype).reshape(leaf.shape)
        # one element has no next one: its step may be any number, also beyond what NumPy takes
        steps = [
            step * dtype.itemsize if size > 1 else 0
            for size, step in zip(leaf.shape, leaf.strides, strict=True)
        ]
        return np.ndarray(leaf.shape, dtype, raw, strides=steps)  # which checks bounds
    except IMPOSSIBLE as cause:
        raise LoadError(
            f"{leaf.name!r:.80} has the shape {leaf.shape}, which NumPy cannot have: {cause}"
        ) from cause


def _dtype(leaf: Leaf) -> np.dtype[Any]:
    """Return NumPy's dtype of a leaf's elements; unsigned integers for what NumPy has none for.

    Raises:
        ConfigError: ml_dtypes has it, and is not there.
    """
    row = leaf.dtype
    if row.numpy:
        return np.dtype(row.numpy)
    if row.ml_dtypes:
        try:
            module = importlib.import_module("ml_dtypes")
            dtype: np.dtype[Any] = np.dtype(getattr(module, row.ml_dtypes))
        except (ImportError, AttributeError) as cause:
            raise ConfigError(
                f"{leaf.name!r:.80} has dtype {row.name}, which NumPy knows through the package "
                "ml_dtypes alone: pip install ml_dtypes"
            ) from cause
        return dtype
    return np.dtype(f"<u{row.nbytes}")
