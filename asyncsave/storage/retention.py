"""Retention: which checkpoints of a run may go, and what a crash has left behind."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .commit import REPLACED, hidden_name
from .filesystem import FileSystem
from .steps import STEP, step_path

_log = logging.getLogger("asyncsave")
_LEFTOVER = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}({re.escape(REPLACED)})?")

Direction = Literal["min", "max"]
KeepBest = tuple[str, Direction] | tuple[str, Direction, int]
Metrics = Callable[[int], float | None]
"""Gives the metric of a step; None where it has none that can be compared."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Which checkpoints stay; one rule suffices. Without rules, all stay.

    Attributes:
        last: the newest so many.
        every: those whose step is a multiple of this.
        best: (metric, "min" or "max", how many).
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, str, int] | None = None

    @classmethod
    def parse(
        cls, keep_last: int | None, keep_every: int | None, keep_best: KeepBest | None
    ) -> Policy:
        """Return the policy that a Checkpointer's arguments mean; ConfigError if none."""
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be a positive int, or None to not use it")
        if keep_best is None:
            return cls(keep_last, keep_every, None)
        parts: list[Any] = [keep_best] if isinstance(keep_best, str) else list(keep_best)
        metric, mode, count = (parts + ["", "", 1][len(parts) :])[:3]
        if not (
            2 <= len(parts) <= 3
            and isinstance(metric, str)
            and mode in ("min", "max")
            and type(count) is int
            and count >= 1
        ):
            name = metric if isinstance(metric, str) and metric else "loss"
            raise ConfigError(
                f"keep_best={keep_best!r} must say which way is better: ({name!r}, 'min') or "
                f"({name!r}, 'max'), and may say how many, one or more: ({name!r}, 'min', 3)"
            )
        return cls(keep_last, keep_every, (metric, mode, count))

    def doomed(self, line: Sequence[int], all_steps: Sequence[int], metric: Metrics) -> list[int]:
        """Return the steps that may be pruned.

        What a rollback left is kept as long as it is among the last so many of all, so that a
        rollback by mistake can be taken back for a while. No other rule counts it.

        Args:
            line: the steps of the run's line, newest first; the newest always stays.
            all_steps: these and those that rollbacks left, newest first.
            metric: gives the one that ``best`` goes by.
        """
        if self == Policy():
            return []
        keep = set(line[:1])
        if self.last is not None:
            keep.update(line[: self.last], all_steps[: self.last])
        if self.every is not None:
            keep.update(step for step in line if step % self.every == 0)
        if self.best is not None:
            keep.update(self.best_of(line, metric)[: self.best[2]])
        return [step for step in all_steps if step not in keep]

    def best_of(self, line: Sequence[int], metric: Metrics) -> list[int]:
        """Return the steps that have the metric, the best one first; of equals, the later."""
        assert self.best is not None
        sign = 1 if self.best[1] == "min" else -1
        known = [(sign * value, -step) for step in line if (value := metric(step)) is not None]
        return [-step for _, step in sorted(known)]


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
