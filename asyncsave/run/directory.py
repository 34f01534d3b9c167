"""RunDirectory: the checkpoints of one run, as the one process that writes them knows them.

It says what the next checkpoint goes on from, and whether it may be: nothing is replaced but what
the run itself has given up, and two runs are never mixed.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..errors import (
    BusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    looking,
)
from ..format.files import CHECKPOINT_FILE
from ..format.lineage import NO_LINEAGE, Lineage
from ..format.notes import parse_step
from ..format.records import CheckpointRecord
from ..pipeline.reuse import Base
from ..pipeline.target import Notes, Target
from ..reading.checkpoint import Checkpoint
from ..reading.history import History, read_history
from ..reading.newest import Position, forget_loaded, loaded
from ..storage.place import Place
from ..storage.steps import list_steps, prune, step_name, sweep
from .retention import Policy

_log = logging.getLogger("asyncsave")

Existing = Literal["refuse", "set_aside"]
Step = int | Literal["best"]


class RunDirectory:
    """One run directory: locked and swept from the making of this object until `close`.

    The pipeline's threads call `committed`, the training thread all else.

    Args:
        existing: what to do when the first save finds checkpoints that the run does not go on from.

    Attributes:
        place: the directory.

    Raises:
        BusyError: somebody else holds the directory.
        WriteError: it cannot be made or used.
    """

    def __init__(self, place: Place, policy: Policy, existing: Existing = "refuse") -> None:
        if existing not in ("refuse", "set_aside"):
            raise ConfigError(f"existing={existing!r} must be 'refuse' or 'set_aside'")
        with looking(place.path):
            is_checkpoint = (place / CHECKPOINT_FILE).exists()
        if is_checkpoint:
            raise ConfigError(
                f"{place} is a checkpoint itself; a run needs a directory for its own, which may "
                "be inside it or beside it"
            )
        self.place = place
        self._mutex = threading.RLock()  # the background reads the history as well
        self.policy = policy
        self._existing = existing
        self._known: dict[int, CheckpointRecord] = {}
        self._position: Position | None = None
        self._restored: int | None = None
        self._resumed: Position | None = None  # what this process went on from at first
        self._warned = False
        place.make_directories()
        try:
            self._lock = place.lock()
        except BusyError as cause:
            raise BusyError(_in_use(place)) from cause
        try:
            with looking(place.path):
                if self._lock is None:
                    _log.warning("%s has a filesystem without locks: nothing is swept", place)
                else:
                    sweep(place)
                self._found: History | None = self.history()  # None: the run has begun here
            self._top = self._found.top  # the highest serial that was given out
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.release()

    # -- what is there ----------------------------------------------------------------------------

    def history(self) -> History:
        """Return all its checkpoints in order."""
        with self._mutex:
            return read_history(self.place, self._known)

    def find(self, step: Step | None) -> Place:
        """Return where the checkpoint of ``step`` is; the directory for None.

        Raises:
            CheckpointNotFoundError: there is none of this step.
        """
        if step is None:
            return self.place
        if step == "best":
            best = self.best()
            if not best:
                raise CheckpointNotFoundError(f"{self.place} has no checkpoint with that metric")
            step = best[0]
        step = parse_step(step, None)
        steps = list_steps(self.place)
        if step not in steps:
            raise CheckpointNotFoundError(
                f"{self.place} has no checkpoint of step {step}; it has {steps}"
            )
        return self.place / step_name(step)

    def best(self) -> list[int]:
        """Return the steps of the line that have the metric of ``keep_best``, the best one first.

        Raises:
            ConfigError: there is no ``keep_best``.
        """
        if self.policy.best is None:
            raise ConfigError("which step is the best is what keep_best=(metric, 'min') says")
        return self.policy.best_of([each.step for each in self.history().line], self._metric)

    def _metric(self, step: int) -> float | None:
        assert self.policy.best is not None
        record = self._known.get(step)
        return None if record is None else record.metrics.get(self.policy.best[0])

    # -- going on ---------------------------------------------------------------------------------

    def restored(self, path: Path, record: CheckpointRecord, *, whole: bool) -> None:
        """Note that the run goes on from this checkpoint of its own.

        Args:
            whole: it was restored as a whole. A part of one moves nobody who is under way.
        """
        if whole or self._position is None:
            self._position = Position.of(path, record)
            self._restored = None if self._position is None else self._position.step
            self._resumed = self._position

    def check(self, step: int) -> None:
        """Refuse what the first save would refuse, before the training has come that far.

        Raises:
            CheckpointExistsError: the directory has checkpoints that the run does not go on from.
            ConfigError: ``step`` is before the one that was restored.
        """
        if self._position is None and self._found is not None:
            self._begin(step, self._found)
        if self._restored is not None and step < self._restored:
            raise ConfigError(
                f"this is step {step}, but the run goes on from step {self._restored}, which was "
                "restored or loaded: begin the loop after the step that restore() returns. To go "
                "back, restore(state, step=…); to begin anew, use another directory"
            )

    def next(self, step: int, notes: Notes) -> Target:
        """Return what a save of ``step`` is to become, which goes on from the last one.

        Raises:
            CheckpointExistsError: there is one that must stay; or as `check`.
            ConfigError: as `check`.
            WriteError: what is there cannot be looked at, or not be set aside.
        """
        self.check(step)
        if self._position is None and self._found is not None and self._found.entries:
            with looking(self.place.path):
                self._set_aside()
        self._found = None
        now = NO_LINEAGE if self._position is None else self._position.lineage
        if self._position is not None and step < self._position.step:
            _log.warning(
                "step %d is saved after step %d, and is the newest then: restore() will take it",
                step,
                self._position.step,
            )
        place = self.place / step_name(step)
        with looking(self.place.path):
            replaces = place.exists()
            if replaces:
                self._check_replaced(step, now)
        lineage = now.next(max(self._top, now.serial))
        self._top = lineage.serial
        self._warn_of_metrics(step, notes.metrics)
        return Target(
            place=place,
            step=step,
            lineage=lineage,
            replace=replaces,
            notes=notes,
            earlier=self._earlier,
            then=functools.partial(self.committed, step, lineage),
        )

    def _earlier(self) -> Base | None:
        """Return what the checkpoint that the run goes on from has; None if there is none.

        Raises:
            LoadError: it cannot be read.
        """
        position = self._position
        if position is None:
            return None
        place = self.place / step_name(position.step)
        with Checkpoint.open(place) as checkpoint:
            manifest = checkpoint.chunks[0].manifest
            identities = [(place / file.name).identity() for file in manifest.files]
            return Base.of(place, manifest.files, identities, manifest.chunks)

    def _begin(self, step: int, history: History) -> None:
        """Find out what the first save goes on from, in a directory that has checkpoints."""
        candidates = [each for each in loaded(self.place.path) if _is_there(each, history)]
        fitting = [each for each in candidates if each.step <= step]
        if fitting or (candidates and self._existing == "refuse"):
            chosen = max(fitting or candidates, key=lambda each: each.lineage.serial)
            self._position, self._restored = chosen, chosen.step
            self._resumed = chosen
        elif history.entries and self._existing == "refuse":
            steps = sorted(each.step for each in history.entries)
            raise CheckpointExistsError(
                f"{self.place} has checkpoints already, of step {_few(steps)}, and this run has "
                "neither restored nor loaded any of them. To go on from the newest, call "
                "restore(state) before the first step; to begin anew, use another directory, or "
                'Checkpointer(…, existing="set_aside"), which moves them into a folder of their own'
            )

    def _check_replaced(self, step: int, now: Lineage) -> None:
        """Raise CheckpointExistsError unless what is there was given up, or is the last one."""
        place, position = self.place / step_name(step), self._position
        if position is not None and step == position.step:
            return  # saved again: by a loop that was resumed, or has come to its end
        there = next((each for each in self.history().entries if each.step == step), None)
        if there is None:
            raise CheckpointExistsError(f"{place} is there, and is no checkpoint: move it away")
        if there.record is None:
            given_up = position is not None and step > position.step
        else:
            # of a later step than the run was resumed at: it was committed before, out of order
            resumed = self._resumed
            given_up = not now.came_from(there.lineage.serial) or (
                resumed is not None
                and step > resumed.step
                and resumed.lineage.came_from(there.lineage.serial)
            )
        if not given_up:
            raise CheckpointExistsError(
                f"{place} is there already, and this run came from it; to go back there, "
                "restore(state, step=…) first, or use another directory"
            )
        _log.warning("replacing %s, which was left when the run went back", place)

    def _set_aside(self) -> None:
        """Move all checkpoints into a folder of their own, which is a run's directory, too."""
        history = self.history()  # anew: an attempt before this may have been cut off
        now = datetime.datetime.now(datetime.UTC)
        folder = self.place / f"set-aside-{now:%Y%m%dT%H%M%S.%f}Z"
        folder.create_directory()
        # the oldest first: if this is cut off, the newest is still the one that is found here
        for each in reversed(history.entries):
            each.place.rename(folder / each.place.name)
        folder.sync()
        self.place.sync()
        self._known.clear()
        self._top = 0
        _log.info("set %d checkpoints of an earlier run aside: %s", len(history.entries), folder)

    # -- after a commit ---------------------------------------------------------------------------

    def committed(self, step: int, lineage: Lineage) -> None:
        """Note that a checkpoint is durable, and prune what the policy does not keep any more."""
        self.go_on_from(step, lineage)
        if self.policy == Policy():
            return
        history = self.history()
        self._top = max(self._top, history.top)
        # What cannot be read is neither pruned nor counted: it may be read again tomorrow.
        line, entries = (
            [each.step for each in some if each.record is not None]
            for some in (history.line, history.entries)
        )
        if line[:1] != [step]:
            why = [each.error for each in history.entries if each.step == step and each.error]
            beside = f"does not look like the newest beside step {line[0] if line else '(none)'}"
            _log.warning(
                "nothing is pruned in %s now: what was saved last, step %d, %s",
                self.place,
                step,
                f"cannot be read: {why[0]}" if why else f"{beside}, which this run did not save",
            )
            return
        gone = prune(self.place, self.policy.doomed(line, entries, self._metric))
        with self._mutex:
            for each in gone:
                self._known.pop(each, None)
        if gone:
            _log.info("pruned %s: step %s", self.place, _few(sorted(gone)))

    def put(self, target: Target) -> None:
        """Note that a checkpoint was put in place, though it is not known to be durable."""
        assert target.step is not None
        self.go_on_from(target.step, target.lineage)

    def go_on_from(self, step: int, lineage: Lineage) -> None:
        """Note that a checkpoint was put in place, from which the next one goes on."""
        with self._mutex:
            self._known.pop(step, None)
        self._position, self._restored = Position(step, lineage), None
        forget_loaded(self.place.path)

    def _warn_of_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log a warning of metrics that are not finite, or that ``keep_best`` lacks."""
        for each, value in metrics.items():
            if value is None:
                _log.warning(
                    "the metric %r of step %d is not finite: it is stored as null, and keep_best "
                    "does not count it",
                    each,
                    step,
                )
        if self.policy.best is None:
            return
        name = self.policy.best[0]
        if name not in metrics:
            if not self._warned:
                given = ", ".join(map(repr, metrics)) or "none"
                _log.warning(
                    "keep_best goes by the metric %r, which step %d was saved without (given: %s): "
                    "it is kept by the other rules only. This is said once",
                    name,
                    step,
                    given,
                )
            self._warned = True


def _is_there(position: Position, history: History) -> bool:
    return any(
        each.step == position.step and each.lineage == position.lineage for each in history.entries
    )


def _few(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])


def _in_use(place: Place) -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks.isdecimal() and int(ranks) > 1:
        return (
            f"another process of this job uses {place}, and this is rank "
            f"{os.environ.get('RANK', '?')} of {ranks}: a checkpoint is written by one process. "
            "Make the Checkpointer on rank 0 alone (all ranks of DDP have the same state), and let "
            "the others read it with asyncsave.restore(directory, state)"
        )
    return (
        f"another Checkpointer, here or in another process, uses {place}; close it, or use another "
        "directory"
    )
