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

from ..errors import (
    BusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    LoadError,
    write_error,
)
from .commit import REPLACED, hidden_name
from .filesystem import FileSystem
from .reader import read_record
from .steps import STEP, list_steps, step_path

_log = logging.getLogger("asyncsave")
_LEFTOVER = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}({re.escape(REPLACED)})?")


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


class Retention:
    """One run directory: locked and swept from the making of this object until `close`.

    The pipeline's threads call `committed`, the training thread all else.

    Attributes:
        directory: the run's.
        own: the steps that were committed through this object.
        restored: the step that the run goes on from, if any.

    Raises:
        BusyError: somebody else holds the directory.
        WriteError: it cannot be made or used.
    """

    def __init__(self, filesystem: FileSystem, directory: Path, policy: Policy) -> None:
        self._filesystem = filesystem
        self.directory = directory
        self._policy = policy
        self._metrics: dict[int, Mapping[str, float | None]] = {}
        self.own: set[int] = set()
        self.restored: int | None = None
        try:
            filesystem.make_directories(directory)
            self._lock = filesystem.lock(directory)
        except BlockingIOError as cause:
            raise BusyError(
                f"another Checkpointer, here or in another process, uses {directory}; close it, "
                "or use another directory"
            ) from cause
        except OSError as cause:
            raise write_error("use", directory, cause) from cause
        if self._lock is None:
            _log.warning("%s is on a filesystem without locks: nothing is swept there", directory)
            return
        try:
            sweep(filesystem, directory)
        except BaseException as cause:  # an interrupt, too, must not leave it locked
            self._lock.release()
            if isinstance(cause, OSError):
                raise write_error("read", directory, cause) from cause
            raise

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.release()

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        return list_steps(self._filesystem, self.directory)

    def path(self, step: int | None) -> Path:
        """Return where the checkpoint of ``step`` is; the run's directory for None."""
        if step is None:
            return self.directory
        if step not in self.steps():
            raise CheckpointNotFoundError(
                f"{self.directory} has no checkpoint of step {step}; it has {self.steps()}"
            )
        return step_path(self.directory, step)

    def may_replace(self, step: int) -> bool:
        """Return whether there is a checkpoint of this step, of an attempt that was given up.

        Raises:
            CheckpointExistsError: there is one that must stay.
        """
        if not self._filesystem.exists(step_path(self.directory, step)):
            return False
        if self.restored is not None and step > self.restored and step not in self.own:
            _log.warning(
                "replacing the checkpoint of step %d, later than step %d, which was restored",
                step,
                self.restored,
            )
            return True
        raise CheckpointExistsError(
            f"{self.directory} has a checkpoint of step {step} already; restore() first to go on "
            "from the newest one, or use another directory"
        )

    def committed(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Prune what the policy does not keep, now that ``step`` is durable."""
        self.own.add(step)
        self._metrics[step] = metrics
        if self._policy != Policy():
            known = {each: self._metrics_of(each) for each in self.steps()}
            doomed = self._policy.doomed({each: known[each] or {} for each in known}, step)
            prune(self._filesystem, self.directory, [e for e in doomed if known[e] is not None])

    def _metrics_of(self, step: int) -> Mapping[str, float | None] | None:
        """Return the metrics of a checkpoint; None if the disk does not give them now."""
        if step not in self._metrics and self._policy.best is None:
            return {}  # nobody asks for them
        if step not in self._metrics:
            try:
                path = step_path(self.directory, step)
                self._metrics[step] = read_record(self._filesystem, path).metrics
            except LoadError as cause:
                _log.warning("could not read the metrics of step %d: %s", step, cause)
                if isinstance(cause.__cause__, OSError):
                    return None  # it may be the best: it stays, and is asked again
                self._metrics[step] = {}
        return self._metrics[step]


def parse_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as they are stored: floats, and None for what is not finite."""
    numbers: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError) as cause:
            raise ConfigError(
                f"the metric {name!r} is {value!r:.80}, which is not a number"
            ) from cause
        numbers[str(name)] = number if math.isfinite(number) else None
    return numbers
