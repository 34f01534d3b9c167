"""Steps: the checkpoints in a run directory, by their names; removed, and swept after a crash."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import IntegrityError, LoadError
from ..format.manifest import CHECKPOINT_FILE
from .commit import REPLACED, hidden_name
from .filesystem import FileSystem

_log = logging.getLogger("asyncsave")

STEP = re.compile(r"step-([0-9]{9,18})")
"""The names of checkpoints in a run directory."""


def step_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, or would be."""
    return directory / f"step-{step:09d}"


def check_name(path: Path, step: int | None) -> None:
    """Raise IntegrityError if the checkpoint at ``path`` has the name of another one's step.

    Who asks for a step must not be given another. Names that are none of a step's are as good as
    any, and so is a checkpoint that was saved without one.
    """
    named = STEP.fullmatch(path.name)
    if named and step is not None and step != int(named[1]):
        raise IntegrityError(
            f"{path} is the checkpoint of step {step} under another one's name; rename it to "
            f"{step_path(path.parent, step).name}, or to what does not name a step",
            path=path / CHECKPOINT_FILE,
            offset=0,
        )


def list_steps(filesystem: FileSystem, directory: Path) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; [] where there is no directory.

    Raises:
        LoadError: the directory cannot be read.
    """
    steps = []
    try:
        for name in filesystem.list_directory(directory):
            match = STEP.fullmatch(name)
            if not match or step_path(directory, int(match[1])).name != name:
                continue
            if filesystem.is_directory(directory / name):
                steps.append(int(match[1]))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as cause:
        raise LoadError(f"{directory} cannot be read: {cause.strerror}") from cause
    except ValueError as cause:  # a NUL in the path
        raise LoadError(f"{directory} cannot be looked into: {cause}") from cause
    return sorted(steps)


_LEFTOVER = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}({re.escape(REPLACED)})?")


def prune(filesystem: FileSystem, directory: Path, steps: Sequence[int]) -> list[int]:
    """Remove checkpoints: hidden first, so that no half-removed one can be seen.

    What cannot be removed is logged and left; a save does not fail because of it.

    Returns:
        The steps of those that are gone.
    """
    hidden, gone = [], []
    for step in steps:
        path = step_path(directory, step)
        name = hidden_name(path)
        try:
            filesystem.rename(path, name)
            hidden.append(name)
            gone.append(step)
        except OSError as cause:
            _log.warning("could not prune %s: %s", path, cause)
    try:
        if hidden:
            filesystem.sync_directory(directory)  # DURABILITY: gone by name before it is gone
        for name in hidden:
            filesystem.remove_tree(name)
    except OSError as cause:
        _log.warning("could not prune all of %s: %s; the next run will", directory, cause)
    return gone


def sweep(filesystem: FileSystem, directory: Path, name: str | None = None) -> list[Path]:
    """Remove what dead writers left in ``directory``, and nobody else's; return what was removed.

    A checkpoint that was about to be replaced, when its writer died, gets its name back.

    Args:
        name: only leftovers of this target; None for those of all steps.
    """
    removed = []
    synced = False
    for entry in filesystem.list_directory(directory):
        match = _LEFTOVER.fullmatch(entry)
        if not match or (match[1] != name if name else not STEP.fullmatch(match[1])):
            continue
        path = directory / entry
        if not filesystem.is_directory(path):
            continue
        try:
            lock = filesystem.lock(path)
        except BlockingIOError:
            continue  # its writer lives
        except OSError as cause:
            _log.warning("could not sweep %s: %s", path, cause)
            continue
        if lock is None:
            continue  # no locks on this filesystem: whether the writer lives cannot be told
        try:
            if not synced:
                # DURABILITY: what is hidden may still have its own name on the device, if its
                # writer died between a rename and the sync; it must lose that before its files
                filesystem.sync_directory(directory)
                synced = True
            if match[2] and not filesystem.exists(directory / match[1]):
                filesystem.rename(path, directory / match[1])
                filesystem.sync_directory(directory)
                _log.info("%s was to be replaced by a save that was cut off; it is back", path)
                continue
            filesystem.remove_tree(path)
            removed.append(path)
            _log.info("removed %s, which a save that was cut off had left", path)
        except OSError as cause:
            _log.warning("could not sweep %s: %s", path, cause)
        finally:
            with contextlib.suppress(OSError):
                lock.release()
    return removed
