"""Saver: memory and threads that saves share, whatever the path; and `save`, which is one of it.

The training thread calls all of it, or several threads take turns; what the saves do in the
background is the pipeline's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from .codec.compression import CompressionSetting, parse_compression
from .errors import CheckpointExistsError, ConfigError, LoadError, looking
from .format.files import CHECKPOINT_FILE
from .format.lineage import NO_LINEAGE, Lineage
from .format.notes import parse_step
from .pipeline.budget import MemoryLimit, parse_limit
from .pipeline.handle import SaveHandle
from .pipeline.pipeline import Pipeline
from .pipeline.session import Session
from .pipeline.target import MAX_FILE_BYTES, Notes, OnDisk, ReuseSetting, Target
from .pipeline.watchdog import STALL_WARNING_SECONDS
from .reading.files import read_record
from .reading.history import read_history
from .storage.place import PathLike, Place, place_of
from .storage.sidecars import Files
from .storage.steps import STEP, step_name, sweep


class Saver(Session):
    """Saves checkpoints to any path, in the background, with memory and threads that it keeps.

    ::

        with asyncsave.Saver(compression=1) as saver:
            for epoch in range(epochs):
                train(model)
                saver.save({"model": model}, f"epochs/{epoch}", metadata={"epoch": epoch})

    It is what frameworks plug in that decide themselves when to save, where to, and what to keep;
    `Checkpointer` decides that for a run. From the second save on, a state of the same shape takes
    no new memory and starts no thread. One save is in flight at a time: the next one waits for it.

    Methods may be called from any thread. The error of a save that failed, and that nobody has seen
    yet, is raised by the next call, which does nothing else then: call it again. Close it, or use
    it in a ``with`` statement: one that is merely dropped finishes its save, frees its threads, and
    warns (ResourceWarning).

    Args:
        compression: "auto", "off", a level from 0 to 22, or a `Compression`.
        memory_limit: most bytes to use beside the state: an int, or a text as "2GB" or "512MiB";
            "auto" is the whole state if that is at most half of the available memory, else that
            half. With less than the state, it is copied in waves.
        overlap: copy device tensors that only the optimizer changes during the next forward and
            backward pass. Off: everything is copied before `save` returns.
        durable: sync files and directories, so that what is reported done survives a power cut.
        reuse: "content": what has the same bytes as in the last checkpoint is not written again,
            but its file linked into the new one, which is whole all the same. "versions": nor are
            parameters of live modules copied that no optimizer has stepped, and to which torch's
            version counters have seen no write; they see none through ``.data``, NumPy, DLPack,
            storages or other libraries' kernels, which would be lost. "off": all is written.
        max_file_bytes: data files become no longer than this.
        stall_warning_seconds: log a warning that says where when a save has stood still for so
            long, and again each time that has doubled; None: never.

    Raises:
        ConfigError: an argument cannot be.
        SaveError: the threads cannot be started.
    """

    def __init__(
        self,
        *,
        compression: CompressionSetting = "auto",
        memory_limit: MemoryLimit = "auto",
        overlap: bool = True,
        durable: bool = True,
        reuse: ReuseSetting = "content",
        max_file_bytes: int = MAX_FILE_BYTES,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
    ) -> None:
        try:
            super().__init__(
                compression=compression,
                memory_limit=memory_limit,
                overlap=overlap,
                on_disk=OnDisk.parse(durable, reuse, max_file_bytes),
                stall_warning_seconds=stall_warning_seconds,
            )
            self._finish_if_dropped("a Saver")
        except BaseException:  # an interrupt may come at any point of it
            if hasattr(self, "_pipeline"):
                self._pipeline.close()
            raise
        self._parent: Place | None = None  # of the last target; its name is on the disk

    def save(
        self,
        state: Any,
        path: PathLike,
        *,
        step: int | None = None,
        overwrite: bool = False,
        files: Files | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
    ) -> SaveHandle:
        """Save ``state`` as one checkpoint at ``path``, in the background.

        On return the snapshot is taken, except that device tensors which only the optimizer changes
        may still be being copied until the fence. The checkpoint exists, whole and durable, once
        the handle's ``result()`` returns; before that there is nothing at ``path``, or what was
        there.

        Args:
            state: any nest of dicts, lists, tuples with tensors, arrays, plain values and objects
                that have ``state_dict()``.
            path: the directory to make; its parent is made if need be.
            step: the training step that ``state`` is after, if it is to be stored.
            overwrite: replace a checkpoint that is at ``path``, in one step, once the new one is
                durable.
            files: files to write beside the state, in the same commit: names, and for each its
                bytes or the path of a file, which is read before this returns. They are found in
                the checkpoint's directory, and `verify` checks them. 256 MiB at most.
            metrics: numbers to store in ``checkpoint.json``.
            metadata: plain JSON to store there.

        Raises:
            StateError, ConfigError, StagingError, CheckpointExistsError: at once; nothing was
                begun.
            SaveError, CommitError: of an earlier save that failed and that nobody has seen;
                nothing was begun. Of this one: from the handle.
        """
        began = time.perf_counter()
        with self._turns.take():
            self._turns.check()
            number = None if step is None else parse_step(step, state)
            notes = Notes.of(metrics, metadata, files)
            where = place_of(path)
            _check_name(where, number)
            self._saves.await_current()
            self._saves.raise_unseen()
            lineage = _prepare(where, overwrite=overwrite, made=self._parent)
            self._parent = where.parent
            target = Target(where, number, lineage, overwrite, notes)
            return self._saves.begin(state, target, began)


def save(
    state: Any,
    path: PathLike,
    *,
    compression: CompressionSetting = "auto",
    memory_limit: MemoryLimit = "auto",
    overwrite: bool = False,
    files: Files | None = None,
) -> SaveHandle:
    """Save ``state`` as one checkpoint at ``path``, in the background: a `Saver` used once.

    See `Saver.save`. For a run of saves use a `Checkpointer`, for several paths a `Saver`: they
    keep their memory and threads.

    Args:
        state: any nest of dicts, lists, tuples with tensors, arrays, plain values and objects that
            have ``state_dict()``.
        path: the directory to make; its parent is made if need be.
        compression: "auto", "off", a level from 0 to 22, or a `Compression`.
        memory_limit: most bytes to use beside the state, as an int or as "2GB", or "auto".
        overwrite: replace a checkpoint that is at ``path``, in one step, once the new one is
            durable.
        files: files to write beside the state, see `Saver.save`.

    Raises:
        StateError, ConfigError, StagingError, CheckpointExistsError: at once.
        SaveError, CommitError: from the handle.
    """
    began = time.perf_counter()
    setting, limit = parse_compression(compression), parse_limit(memory_limit)
    notes = Notes.of(None, None, files)
    where = place_of(path)
    _check_name(where, None)
    lineage = _prepare(where, overwrite=overwrite)
    target = Target(where, None, lineage, overwrite, notes)
    pipeline = Pipeline(
        compression=setting, memory_limit=limit, overlap=True, on_disk=OnDisk(reuse="off")
    )
    try:
        handle = pipeline.save(state, target, began)
        pipeline.end()
    except BaseException:
        pipeline.close()
        raise
    return handle


def _check_name(target: Place, step: int | None) -> None:
    """Raise ConfigError if the path has the name of another step's, which no load would believe."""
    named = STEP.fullmatch(target.name)
    if named and step_name(int(named[1])) != target.name:
        raise ConfigError(
            f"{target.name} looks like the name of step {int(named[1])}, which is "
            f"{step_name(int(named[1]))}: choose that, or another name"
        )
    if named and step is not None and int(named[1]) != step:
        raise ConfigError(
            f"{target.name} is the name of step {int(named[1])}, and this is step {step}: choose "
            "another name"
        )


def _prepare(target: Place, *, overwrite: bool, made: Place | None = None) -> Lineage:
    """Make the parent, sweep what dead writers left for this target, and check it.

    Args:
        made: a parent that was made, or found, and synced before: that may take long.

    Returns:
        The place in a run of what is overwritten; a new one has none.

    Raises:
        CheckpointExistsError, ConfigError, WriteError: it cannot be.
    """
    if target.parent != made or not made.exists():
        target.parent.make_directories()
    with looking(target.path):
        sweep(target.parent, target.name)
        _check_target(target, overwrite=overwrite)
        return _lineage(target)


def _check_target(target: Place, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if target.is_directory():
        if not target.names():
            return
        if overwrite and (target / CHECKPOINT_FILE).exists():
            return
    hint = (
        "it is not a checkpoint and will not be replaced; choose another path"
        if overwrite
        else "choose another path, or pass overwrite=True to replace a checkpoint"
    )
    raise CheckpointExistsError(f"{target} exists already: {hint}")


def _lineage(target: Place) -> Lineage:
    """Return the place in a run of what is overwritten; a new one has none.

    Raises:
        ConfigError: it would be a new checkpoint of a run, beside the Checkpointer's.
    """
    if not STEP.fullmatch(target.name):
        return NO_LINEAGE
    if (target / CHECKPOINT_FILE).exists():
        with contextlib.suppress(LoadError):
            return read_record(target).lineage
        return NO_LINEAGE
    if any(each.lineage.serial for each in read_history(target.parent).entries):
        raise ConfigError(
            f"{target.parent} is the directory of a run, whose Checkpointer alone knows what comes "
            "after what: choose a path beside it, or another name than one of a step"
        )
    return NO_LINEAGE
