"""Newest: the one rule by which a checkpoint is chosen, for whoever reads a run.

A path is a checkpoint, or a run's directory: then its line is tried from the newest checkpoint on
(lineage.py), and damage is passed over, with a warning. What is no damage is raised: a newer
format, a permission that lacks, too little memory. To go on from an older checkpoint would lose
work then. What a rollback left is never tried.

Also here: which checkpoints this process has loaded, so that a run knows what it goes on from,
though it was read by `load` and put into place by hand.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import (
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    LoadError,
    UnsupportedVersionError,
)
from ..format.files import CHECKPOINT_FILE
from ..format.lineage import Lineage
from ..format.records import CheckpointRecord
from ..storage.place import Place
from ..storage.steps import STEP
from .checkpoint import Checkpoint
from .history import Entry, History, read_history

_log = logging.getLogger("asyncsave")
_T = TypeVar("_T")

PassedOver = Callable[[Path, str], None]


def find(place: Place) -> History:
    """Return the checkpoint at ``place`` as a history of one; or that of the run there.

    Raises:
        CheckpointNotFoundError: it is neither.
        LoadError: the directory cannot be read.
    """
    if (place / CHECKPOINT_FILE).exists():
        return History((Entry(0, place),), (), 0)
    history = read_history(place)
    if not history.line:
        why = (
            "there is nothing there"
            if not place.exists()
            else f"it has no {CHECKPOINT_FILE} and no step-… directories"
        )
        raise CheckpointNotFoundError(f"there is no checkpoint at {place}: {why}")
    return history


def first_sound(
    place: Place,
    use: Callable[[Checkpoint], _T],
    passed_over: PassedOver | None = None,
) -> _T:
    """Use the newest checkpoint that is not damaged.

    Args:
        use: notes by itself what it loads (`note_loaded`): to look into a run is not to go on.
        passed_over: told which checkpoints could not be used, and why.

    Raises:
        LoadError: all are damaged, and this is the newest one's; or it is no damage.
    """
    history = find(place)
    errors: list[LoadError] = []
    for each in history.line:
        try:
            with Checkpoint.open(each.place) as checkpoint:
                result = use(checkpoint)
        except UnsupportedVersionError:
            raise  # it is sound: going on from an older one would lose work without a word
        except (IntegrityError, FormatError, CheckpointNotFoundError) as error:
            errors.append(error)
            if each.place != place:
                _log.warning("passed over %s: %s", each.path, error)
                if passed_over is not None:
                    passed_over(each.path, str(error))
            continue
        _warn(history, each, is_first=not errors)
        return result
    raise _noted(errors, history)


def _noted(errors: list[LoadError], history: History) -> LoadError:
    """Return the newest one's error, with all else in its notes."""
    error, *others = errors
    for older in others:
        error.add_note(f"and the one before: {older}")
    if history.left:
        steps = ", ".join(str(each.step) for each in reversed(history.left))
        error.add_note(
            f"not tried, since a rollback had left them: step {steps}; to take one, give its path"
        )
    return error


def _warn(history: History, used: Entry, *, is_first: bool) -> None:
    """Log what was not tried before what was used, and what cannot be read."""
    if not is_first:
        _log.warning("used %s instead", used.path)
        if sound := [entry.path.name for entry in history.left if entry.record is not None]:
            _log.warning("not tried, as a rollback had left them, or may have: %s", sound)
    older = [*history.line[history.line.index(used) + 1 :], *history.left]
    for each in older:
        if each.error is not None:
            _log.warning(
                "%s was taken for an older one; it cannot be read: %s", each.path, each.error
            )


# -- what was loaded --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Position:
    """A checkpoint that a run goes on from."""

    step: int
    lineage: Lineage

    @classmethod
    def of(cls, path: Path, record: CheckpointRecord) -> Position | None:
        """Return that of a checkpoint; None if its name is not that of a run's checkpoint."""
        name = STEP.fullmatch(path.name)
        return None if name is None else cls(int(name[1]), record.lineage)


_loaded: dict[str, list[Position]] = {}


def note_loaded(checkpoint: Checkpoint) -> None:
    """Note that the caller has what is in a checkpoint, and that its run may go on from there."""
    position = Position.of(checkpoint.path, checkpoint.record)
    if position is not None:
        positions = _loaded.setdefault(os.path.realpath(checkpoint.path.parent), [])
        if position not in positions:
            positions.append(position)


def loaded(directory: Path) -> list[Position]:
    """Return what this process has loaded from the run in ``directory``."""
    return list(_loaded.get(os.path.realpath(directory), ()))


def forget_loaded(directory: Path) -> None:
    """Forget it: a run has gone on from there."""
    _loaded.pop(os.path.realpath(directory), None)
