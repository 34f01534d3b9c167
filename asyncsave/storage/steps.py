"""Steps: the checkpoints in a run directory, by their names; removed, and swept after a crash."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from ..errors import BusyError, IntegrityError, LoadError, WriteError
from ..format.files import CHECKPOINT_FILE
from .draft import REPLACED, hidden
from .place import Place

_log = logging.getLogger("asyncsave")

STEP = re.compile(r"step-([0-9]{9,18})")
"""The names of checkpoints in a run directory."""


def step_name(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step-{step:09d}"


def check_name(place: Place, step: int | None) -> None:
    """Raise IntegrityError if the checkpoint at ``place`` has the name of another one's step.

    Who asks for a step must not be given another. Names that are none of a step's are as good as
    any, and so is a checkpoint that was saved without one.
    """
    named = STEP.fullmatch(place.name)
    if named and step is not None and step != int(named[1]):
        raise IntegrityError(
            f"{place} is the checkpoint of step {step} under another one's name; rename it to "
            f"{step_name(step)}, or to what does not name a step",
            path=place.path / CHECKPOINT_FILE,
            offset=0,
        )


def list_steps(run: Place) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; [] where there is no directory.

    Raises:
        LoadError: the directory cannot be read.
    """
    steps = []
    for name in run.names():
        match = STEP.fullmatch(name)
        if match and step_name(int(match[1])) == name and (run / name).is_directory():
            steps.append(int(match[1]))
    return sorted(steps)


_LEFTOVER = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}({re.escape(REPLACED)})?")


def prune(run: Place, steps: Sequence[int]) -> list[int]:
    """Remove checkpoints: hidden first, so that no half-removed one can be seen.

    What cannot be removed is logged and left; a save does not fail because of it.

    Returns:
        The steps of those that are gone.
    """
    doomed, gone = [], []
    for step in steps:
        place = run / step_name(step)
        name = hidden(place)
        try:
            place.rename(name)
            doomed.append(name)
            gone.append(step)
        except WriteError as cause:
            _log.warning("could not prune %s: %s", place, cause)
    try:
        if doomed:
            run.sync()  # DURABILITY: gone by name before it is gone
        for name in doomed:
            name.remove()
    except WriteError as cause:
        _log.warning("could not prune all of %s: %s; the next run will", run, cause)
    return gone


def sweep(directory: Place, name: str | None = None) -> list[Place]:
    """Remove what dead writers left in ``directory``, and nobody else's; return what was removed.

    A checkpoint that was about to be replaced, when its writer died, gets its name back. What
    cannot be swept is logged and left.

    Args:
        name: only leftovers of this target; None for those of all steps.

    Raises:
        LoadError: the directory cannot be read.
    """
    removed = []
    synced = False
    for entry in directory.names():
        match = _LEFTOVER.fullmatch(entry)
        if not match or (match[1] != name if name else not STEP.fullmatch(match[1])):
            continue
        place = directory / entry
        if not place.is_directory():
            continue
        try:
            lock = place.lock()
        except BusyError:
            continue  # its writer lives
        except WriteError as cause:
            _log.warning("could not sweep %s: %s", place, cause)
            continue
        if lock is None:
            continue  # no locks on this filesystem: whether the writer lives cannot be told
        try:
            if not synced:
                # DURABILITY: what is hidden may still have its own name on the device, if its
                # writer died between a rename and the sync; it must lose that before its files
                directory.sync()
                synced = True
            if _take(place, directory / match[1], was_replaced=bool(match[2])):
                removed.append(place)
        except (WriteError, LoadError) as cause:
            _log.warning("could not sweep %s: %s", place, cause)
        finally:
            lock.release()
    return removed


def _take(place: Place, target: Place, *, was_replaced: bool) -> bool:
    """Remove a leftover, and return True; or give it its name back, if nothing took its place.

    Raises:
        WriteError, LoadError: that cannot be done: what is no checkpoint stands there, say.
    """
    whole = was_replaced and (place / CHECKPOINT_FILE).exists()
    if whole and not (target / CHECKPOINT_FILE).exists():
        place.rename(target)  # also over an empty directory
        target.parent.sync()
        _log.info("%s was to be replaced by a save that was cut off; it is back", target)
        return False
    place.remove()
    _log.info("removed %s, which a save that was cut off had left", place)
    return True
