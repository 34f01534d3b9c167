"""Commit: from a directory being written to a checkpoint.

The order is the promise, each step only after the one before has returned:

    data synced → rank manifest synced → checkpoint.json synced → directory synced
    → rename → parent synced → reported durable → older checkpoints may be pruned

A directory that is being written has a hidden name with a random token, ``.step-000001000.1f3a…``,
and its writer holds a lock on it, so that its leftovers can be told from a save that is still
running.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointExistsError, CommitError, write_error
from ..format.manifest import CHECKPOINT_FILE, data_file, rank_file
from .filesystem import FileSystem, Lock

_log = logging.getLogger("asyncsave")


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint directory under its temporary name."""

    path: Path
    target: Path
    lock: Lock | None

    @property
    def data_path(self) -> Path:
        """Where the data file is written."""
        return self.path / data_file(0)


REPLACED = ".replaced"
"""Ends the hidden name of a checkpoint whose place another is about to take; see `_rename`."""


def hidden_name(target: Path) -> Path:
    """Return a new temporary name beside ``target``."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def begin(filesystem: FileSystem, target: Path) -> Draft:
    """Make and lock the directory that will become ``target``."""
    path = hidden_name(target)
    try:
        filesystem.create_directory(path)
        try:
            return Draft(path, target, filesystem.lock(path))
        except OSError:
            with contextlib.suppress(OSError):  # a leftover, which the next sweep takes
                filesystem.remove_tree(path)
            raise
    except OSError as cause:
        raise write_error("create", path, cause) from cause


def commit(
    filesystem: FileSystem,
    draft: Draft,
    rank_bytes: bytes,
    checkpoint_bytes: bytes,
    *,
    durable: bool,
    replace: bool,
) -> None:
    """Make a draft whose data file is complete (and synced, if durable) the checkpoint.

    Raises:
        WriteError: not committed; the draft must be discarded.
        CheckpointExistsError: not committed; something came to be at the target meanwhile.
        CommitError: renamed, but the parent directory could not be synced.
    """
    parent = draft.target.parent
    try:
        filesystem.write_file(draft.path / rank_file(0), rank_bytes, sync=durable)
        filesystem.write_file(draft.path / CHECKPOINT_FILE, checkpoint_bytes, sync=durable)
        if durable:
            filesystem.sync_directory(draft.path)  # DURABILITY: all entries before the rename
        old = _rename(filesystem, draft, replace=replace)  # COMMIT POINT
    except CheckpointExistsError:  # an OSError, too, but in asyncsave's words already
        raise
    except OSError as cause:
        raise write_error("commit", draft.target, cause) from cause
    if draft.lock is not None:
        draft.lock.release()
    if durable:
        try:
            filesystem.sync_directory(parent)  # DURABILITY: the rename itself
        except OSError as cause:
            raise CommitError(
                f"{draft.target} is in place, but {parent} could not be synced: {cause}. It can be "
                "loaded now; whether it would survive a power cut is not known"
            ) from cause
    if old is not None:
        with contextlib.suppress(OSError):  # a leftover, which the next sweep takes
            filesystem.remove_tree(old)


def _rename(filesystem: FileSystem, draft: Draft, *, replace: bool) -> Path | None:
    """Put the draft in place; return the hidden name of what it replaced, if anything."""
    try:
        filesystem.rename(draft.path, draft.target)
        return None
    except OSError as cause:
        if not filesystem.exists(draft.target):
            raise
        if not replace:
            raise CheckpointExistsError(
                f"{draft.target} came to be while it was being saved; it was left as it is"
            ) from cause
    if filesystem.exchange(draft.path, draft.target):
        return draft.path
    # no atomic swap here: for a moment neither is there by name, and a sweep puts the old one back
    old = Path(f"{hidden_name(draft.target)}{REPLACED}")
    filesystem.rename(draft.target, old)
    try:
        filesystem.rename(draft.path, draft.target)
    except BaseException:
        filesystem.rename(old, draft.target)
        raise
    return old


def discard(filesystem: FileSystem, draft: Draft) -> None:
    """Remove a draft that will not be committed; what cannot be removed is left for a sweep."""
    try:
        filesystem.remove_tree(draft.path)
    except OSError as cause:
        _log.warning("could not remove %s: %s; the next run will", draft.path, cause)
    if draft.lock is not None:
        draft.lock.release()
