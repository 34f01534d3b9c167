"""Retention: which checkpoints a run directory has, which may go, and what a crash left behind."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .commit import hidden_name
from .filesystem import FileSystem

_log = logging.getLogger("asyncsave")
_STEP = re.compile(r"step-([0-9]{9,18})")
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{16}")


def step_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, or would be."""
    return directory / f"step-{step:09d}"


def list_steps(filesystem: FileSystem, directory: Path) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; [] where there is no directory."""
    try:
        names = filesystem.list_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = []
    for name in names:
        match = _STEP.fullmatch(name)
        if not match or step_path(directory, int(match[1])).name != name:
            continue
        if filesystem.is_directory(directory / name):
            steps.append(int(match[1]))
    return sorted(steps)


KeepBest = str | tuple[str, Literal["min", "max"]] | tuple[str, Literal["min", "max"], int]


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
        metric, mode, count = (parts + ["", "min", 1][len(parts) :])[:3]
        if not (
            len(parts) <= 3
            and isinstance(metric, str)
            and mode in ("min", "max")
            and type(count) is int
            and count >= 1
        ):
            raise ConfigError(
                f"keep_best={keep_best!r} is not known: use a metric's name (lowest is best), or "
                "(name, 'min' or 'max'), or (name, 'min' or 'max', how many)"
            )
        return cls(keep_last, keep_every, (metric, str(mode), count))

    def doomed(self, metrics: Mapping[int, Mapping[str, float | None]], current: int) -> list[int]:
        """Return the steps that may be pruned once ``current`` is durable.

        Args:
            metrics: of every checkpoint in the directory.
            current: the step that was just committed. Later steps, which an earlier attempt at this
                run has left, are neither counted nor pruned: they are replaced when it gets there.
        """
        if self == Policy():
            return []
        steps = sorted(step for step in metrics if step <= current)
        keep = {current}
        if self.last is not None:
            keep.update(steps[-self.last :])
        if self.every is not None:
            keep.update(step for step in steps if step % self.every == 0)
        if self.best is not None:
            name, mode, count = self.best
            sign = 1 if mode == "min" else -1
            scored = []
            for step in steps:
                value = metrics[step].get(name)
                if value is not None and not math.isnan(value):
                    scored.append((sign * value, -step, step))
            keep.update(step for _, _, step in sorted(scored)[:count])
        return [step for step in steps if step not in keep]


def prune(filesystem: FileSystem, directory: Path, steps: list[int]) -> None:
    """Remove checkpoints: hidden first, so that no half-removed one can be seen.

    What cannot be removed is logged and left; a save does not fail because of it.
    """
    hidden = []
    for step in steps:
        path = step_path(directory, step)
        name = hidden_name(path)
        try:
            filesystem.rename(path, name)
            hidden.append(name)
        except OSError as cause:
            _log.warning("could not prune %s: %s", path, cause)
    try:
        if hidden:
            filesystem.sync_directory(directory)  # DURABILITY: gone by name before it is gone
        for name in hidden:
            filesystem.remove_tree(name)
    except OSError as cause:
        _log.warning("could not prune all of %s: %s; the next run will", directory, cause)


def sweep(filesystem: FileSystem, directory: Path, name: str | None = None) -> list[Path]:
    """Remove what dead writers left in ``directory``, and nobody else's; return what was removed.

    Args:
        name: only leftovers of this target; None for those of all steps.
    """
    removed = []
    for entry in filesystem.list_directory(directory):
        match = _LEFTOVER.fullmatch(entry)
        if not match or (match[1] != name if name else not _STEP.fullmatch(match[1])):
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
            filesystem.remove_tree(path)
            removed.append(path)
            _log.info("removed %s, which a save that was cut off had left", path)
        except OSError as cause:
            _log.warning("could not sweep %s: %s", path, cause)
        finally:
            with contextlib.suppress(OSError):
                lock.release()
    return removed
