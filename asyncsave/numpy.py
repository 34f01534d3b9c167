"""Load checkpoints as NumPy arrays, where torch cannot be imported or is not wanted.

Used as ``asyncsave.numpy.load(path)``; see there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .reading.arrays import load_arrays
from .storage.place import PathLike, place_of

__all__ = ["load"]


def load(path: PathLike, keys: str | Sequence[str] | None = None) -> Any:
    """Load a checkpoint, or the newest sound one of a run, with a NumPy array for each tensor.

    Every byte that is read is checked. Nothing is unpickled, and torch is neither needed nor
    imported.

    Args:
        path: a checkpoint, or the directory of a run.
        keys: a glob or a list of globs of fqns: only what they name is loaded, and only that is
            read, as in `asyncsave.load`.

    Returns:
        The state as it was saved, except for what is torch's: a tensor is an array of its shape,
        and arrays share memory where tensors did; bfloat16 and the float8 types are those of the
        package ml_dtypes; types that neither knows (complex32, the bits and sub-byte types) are
        unsigned integers of the same width; a `torch.Size` is a tuple, a dtype or a device its
        name, as in "torch.float32" and "cuda:0".

    Raises:
        MismatchError: a key names nothing.
        ConfigError: ml_dtypes is needed, and is not there.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`.
    """
    return load_arrays(place_of(path), keys)
