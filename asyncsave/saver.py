"""Single: one checkpoint, without a run around it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from .codec.compression import CompressionSetting, parse_compression
from .errors import CheckpointExistsError, ConfigError, LoadError, write_error
from .format.lineage import NO_LINEAGE, Lineage
from .format.manifest import CHECKPOINT_FILE
from .pipeline.budget import MemoryLimit, parse_limit
from .pipeline.handle import SaveHandle
from .pipeline.pipeline import Pipeline
from .pipeline.save import Target
from .reading.checkpoint import read_record
from .reading.history import read_history
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.place import PathLike, local_path
from .storage.steps import STEP, sweep


def save(
    state: Any,
    path: PathLike,
    *,
    compression: CompressionSetting = "auto",
    memory_limit: MemoryLimit = "auto",
    overwrite: bool = False,
) -> SaveHandle:
    """Save ``state`` as one checkpoint at ``path``, in the background.

    On return the snapshot is taken, except that device tensors which only the optimizer changes may
    still be being copied until the fence. The checkpoint exists, whole and durable, once the
    handle's ``result()`` returns; before that there is nothing at ``path``, or what was there.

    For a run of saves use `Checkpointer`, which keeps its memory and threads.

    Args:
        state: any nest of dicts, lists, tuples with tensors, arrays, plain values and objects that
            have ``state_dict()``.
        path: the directory to make; its parent is made if need be.
        compression: "auto", "off", a level from 0 to 22, or a `Compression`.
        memory_limit: most bytes to use beside the state, as an int or as "2GB", or "auto".
        overwrite: replace a checkpoint that is at ``path``, in one step, once the new one is
            durable.

    Raises:
        StateError, ConfigError, StagingError, CheckpointExistsError: at once.
        SaveError, CommitError: from the handle.
    """
    began = time.perf_counter()
    setting, limit = parse_compression(compression), parse_limit(memory_limit)
    filesystem = LocalFileSystem()
    target = local_path(path)
    try:
        filesystem.make_directories(target.parent)
        sweep(filesystem, target.parent, target.name)
        _check_target(filesystem, target, overwrite=overwrite)
        lineage = _lineage(filesystem, target)
    except CheckpointExistsError:  # an OSError, too, but in asyncsave's words already
        raise
    except OSError as cause:
        raise write_error("create", target, cause) from cause
    pipeline = Pipeline(
        filesystem, compression=setting, memory_limit=limit, overlap=True, durable=True
    )
    try:
        handle = pipeline.save(state, Target(target, lineage=lineage, replace=overwrite), began)
        pipeline.end()
    except BaseException:
        pipeline.close()
        raise
    return handle


def _check_target(filesystem: FileSystem, target: Path, *, overwrite: bool) -> None:
    if not filesystem.exists(target):
        return
    if filesystem.is_directory(target):
        if not filesystem.list_directory(target):
            return
        if overwrite and filesystem.exists(target / CHECKPOINT_FILE):
            return
    hint = (
        "it is not a checkpoint and will not be replaced; choose another path"
        if overwrite
        else "choose another path, or pass overwrite=True to replace a checkpoint"
    )
    raise CheckpointExistsError(f"{target} exists already: {hint}")


def _lineage(filesystem: FileSystem, target: Path) -> Lineage:
    """Return the place in a run of what is overwritten; a new one has none.

    Raises:
        ConfigError: it would be a new checkpoint of a run, beside the Checkpointer's.
    """
    if not STEP.fullmatch(target.name):
        return NO_LINEAGE
    if filesystem.exists(target / CHECKPOINT_FILE):
        with contextlib.suppress(LoadError):
            return read_record(filesystem, target).lineage
        return NO_LINEAGE
    if any(each.lineage.serial for each in read_history(filesystem, target.parent).entries):
        raise ConfigError(
            f"{target.parent} is the directory of a run, whose Checkpointer alone knows what comes "
            "after what: choose a path beside it, or another name than one of a step"
        )
    return NO_LINEAGE
