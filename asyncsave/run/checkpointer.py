"""Checkpointer: one training run's checkpoints. When to save, what to keep, how to stop.

Everything here runs in the thread that calls it, and a lock lets several threads call. What the
saves do in the background is the pipeline's.
"""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..codec.compression import CompressionSetting
from ..errors import ConfigError
from ..format.notes import parse_step
from ..pipeline.budget import MemoryLimit
from ..pipeline.handle import SaveHandle
from ..pipeline.saves import OnBusy, OnError
from ..pipeline.session import Session
from ..pipeline.target import MAX_FILE_BYTES, Notes, OnDisk, ReuseSetting
from ..pipeline.watchdog import STALL_WARNING_SECONDS
from ..reading.listing import list_checkpoints
from ..report import CheckpointInfo, RestoreReport
from ..restoring.restore import load_from, restore_from
from ..restoring.wish import Wish
from ..storage.place import PathLike, place_of
from ..storage.sidecars import Files
from .cadence import Cadence
from .directory import Existing, RunDirectory, Step
from .retention import KeepBest, Policy
from .signals import StopSignals

_log = logging.getLogger("asyncsave")


class Checkpointer(Session):
    """Saves, prunes and restores the checkpoints of one run.

    ::

        with asyncsave.Checkpointer("runs/gpt", every_steps=500, keep_last=3) as ckpt:
            state = {"model": model, "optimizer": optimizer, "rng": asyncsave.RngState()}
            start = ckpt.restore(state) or 0
            for step in range(start + 1, total + 1):
                train_one_step()
                ckpt.step(step, state)
                if ckpt.should_stop:
                    break

    The directory belongs to one Checkpointer at a time, and to one run: into a directory that has
    checkpoints, a run saves only if it has restored or loaded one of them. The newest is the one
    that was committed last, whatever its step: after ``restore(state, step=10)`` the run goes on
    from there, and what was saved after step 10 before is not restored again by itself.

    Methods may be called from any thread. The error of a background save that failed, and that
    nobody has seen yet, is raised by the next call: by `step` and `save` after they have begun the
    save they were called for. Only a done callback must not call them: it would wait for itself,
    and gets a BusyError.
    Close it, or use it in a ``with`` statement: one that is merely dropped finishes its save, frees
    its threads and its directory, and warns (ResourceWarning).

    Args:
        directory: where checkpoints go, made if need be. What a killed run left half-written is
            removed.
        every_steps: `step` saves when the step is a multiple of this.
        every_seconds: `step` saves when this much time has passed since the last save began.
        keep_last: keep the newest so many.
        keep_every: keep those whose step is a multiple of this.
        keep_best: keep the best by a metric given to `step`: a tuple of its name, "min" or "max",
            and, if it is not one, how many. A checkpoint stays if any rule keeps it; without rules
            all stay. Nothing is removed before what replaces it is durable. What a rollback left
            is kept only as long as it is among the last ``keep_last`` of all.
        existing: what the first save does in a directory with checkpoints that this run neither
            restored nor loaded: "refuse" (CheckpointExistsError, at the first step already), or
            "set_aside": move them into ``set-aside-…`` in the directory, which can be read like
            any run.
        compression: "auto", "off", a level from 0 to 22, or a `Compression`.
        memory_limit: most bytes to use beside the state: an int, or a text as "2GB" or "512MiB";
            "auto" is the whole state if that is at most half of the available memory, else that
            half. With less than the state, it is copied in waves.
        on_busy: when a save is due and the last one still runs: "wait" for it, "skip" this one, or
            raise an "error" (BusyError).
        on_error: a save in the background has failed: the next `step` or `save` "raise"s its error
            or "warn"s of it in the log, and either way begins its own save. All other methods
            raise.
        overlap: copy device tensors that only the optimizer changes during the next forward and
            backward pass. Off: everything is copied before `save` returns.
        signals: on one of these, the next `step` saves, waits until durable and sets `should_stop`;
            a second one does what it would do without asyncsave. They are handled from the first
            `step` on, and not in notebooks.
        durable: sync files and directories, so that what is reported done survives a power cut.
            Off: a power cut may leave nothing, as older ones are removed all the same.
        reuse: "content": what has the same bytes as in the last checkpoint is not written again,
            but its file linked into the new one, which is whole all the same. "versions": nor are
            parameters of live modules copied that no optimizer has stepped, and to which torch's
            version counters have seen no write; they see none through ``.data``, NumPy, DLPack,
            storages or other libraries' kernels, which would be lost. "off": all is written.
        max_file_bytes: data files become no longer than this.
        stall_warning_seconds: log a warning that says where when a save has stood still for so long
            (on a disk that hangs), and again each time that has doubled; None: never.

    Raises:
        ConfigError: an argument cannot be.
        BusyError: another Checkpointer, here or in another process, is using the directory.
        WriteError: the directory cannot be made or used.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        compression: CompressionSetting = "auto",
        memory_limit: MemoryLimit = "auto",
        existing: Existing = "refuse",
        on_busy: OnBusy = "wait",
        on_error: OnError = "raise",
        overlap: bool = True,
        signals: Iterable[int] = (signal.SIGTERM,),
        durable: bool = True,
        reuse: ReuseSetting = "content",
        max_file_bytes: int = MAX_FILE_BYTES,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
    ) -> None:
        self._cadence = Cadence(every_steps, every_seconds)
        policy = Policy.parse(keep_last, keep_every, keep_best)
        place = place_of(directory)
        self._should_stop = self._has_begun = False
        self._signals = StopSignals(signals)
        try:
            super().__init__(
                compression=compression,
                memory_limit=memory_limit,
                overlap=overlap,
                on_disk=OnDisk.parse(durable, reuse, max_file_bytes),
                stall_warning_seconds=stall_warning_seconds,
                on_busy=on_busy,
                on_error=on_error,
            )
            self._run = RunDirectory(place, policy, existing)
            self._finish_if_dropped(
                f"the Checkpointer of {place}", self._signals.close, self._run.close
            )
        except BaseException:  # an interrupt may come at any point of it
            for name in ("_pipeline", "_run"):
                if hasattr(self, name):
                    getattr(self, name).close()
            raise

    # -- saving -------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        state: Any,
        *,
        files: Files | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
    ) -> SaveHandle | None:
        """Save ``state`` if it is due; call after every training step.

        It is due when ``every_steps`` or ``every_seconds`` says so, and when a signal has arrived:
        then this call waits until the checkpoint is durable, and `should_stop` is true on return.

        Args:
            step: the training step that ``state`` is after.
            files: files to write beside the state, in the same commit, see `Saver.save`.
            metrics: numbers to store, which ``keep_best`` may go by.
            metadata: plain JSON to store in ``checkpoint.json``.

        Returns:
            The handle of the save that was begun, or None.

        Raises:
            ConfigError: neither ``every_steps`` nor ``every_seconds`` was given, so that it would
                never save; or ``step`` is one before that which was restored.
            StateError: at the first call, too, whether or not a save is due then: ``state`` holds
                what cannot be saved, see `check`.
            What `save` raises, and the error of an earlier save that nobody has seen.
        """
        if self._is_idle(step):
            return None
        with self._turns.take():
            self._turns.check()
            self._signals.install(self._pipeline.call_soon)
            number = parse_step(step, state)
            if self._cadence.is_never:
                raise ConfigError(
                    "step() saves when that is due, and nothing says when: give the Checkpointer "
                    "every_steps= or every_seconds=, or call save()"
                )
            stopping = self._signals.arrived and not self._should_stop
            is_due = stopping or self._cadence.due(number)
            if not self._has_begun:
                self._run.check(number)
                if not is_due:  # now, not after the first 500 steps
                    self._pipeline.check(state)
                self._has_begun = True
            handle = None
            if is_due:
                handle = self._begin(number, state, files, metrics, metadata, wait=stopping)
                if handle is not None:
                    self._cadence.restart()
            if stopping and handle is not None:
                handle.result()
                self._should_stop = True
                self._signals.answered()
            self._saves.tell_unseen(but=handle)
            return handle

    def save(
        self,
        step: int,
        state: Any,
        *,
        files: Files | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
        block: bool = False,
    ) -> SaveHandle | None:
        """Save ``state`` now.

        On return the snapshot is taken, except for copies that are allowed until the fence; with
        ``block``, the checkpoint is durable. The step that was saved or restored last may be saved
        again, and is replaced.

        Returns:
            The handle; None only if a save is in flight and ``on_busy="skip"``.

        Raises:
            StateError, StagingError, ConfigError: this state was not saved.
            CheckpointExistsError: this step was saved before the last one; or the directory has
                checkpoints of another run.
            BusyError: a save is in flight and ``on_busy="error"``.
            SaveError, CommitError: with ``block``, this save's; else one of an earlier save, while
                this one was begun.
        """
        with self._turns.take():
            self._turns.check()
            number = parse_step(step, state)
            handle = self._begin(number, state, files, metrics, metadata)
            if handle is not None:
                self._cadence.restart()
            if not block:
                self._saves.tell_unseen(but=handle)
        if block and handle is not None:
            handle.result()
            with self._turns.take():
                self._saves.tell_unseen(but=handle)
        return handle

    # -- restoring ----------------------------------------------------------------------------

    def restore(
        self,
        state: Any,
        *,
        step: Step | None = None,
        strict: bool = True,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
        report: Callable[[RestoreReport], None] | None = None,
    ) -> int | None:
        """Fill ``state`` from the newest checkpoint that verifies, or ``step``'s; return its step.

        The run goes on from there: with an older step than the newest it is a rollback, which the
        first save after it makes final. (A part, by ``keys``, moves no run that is under way.) See
        `asyncsave.restore` for the arguments, and `best_step` for "best". If the run has no
        checkpoint, the result is None. Damaged ones that were passed over are logged, and in
        ``stats.passed_over``.

        Raises:
            LoadError: as `asyncsave.restore`; damage only if all checkpoints are damaged.
        """
        wish = Wish.parse(strict=strict, keys=keys, rename=rename, cast=cast)
        with self._turns.take():
            self._turns.check()
            self._saves.raise_unseen()
            self._saves.await_current()
            found = self._run.find(step)
            if step is None and not self.steps():
                return None
            self._saves.note_uncertain(self._run.put)
            self._has_begun = False
            self._cadence.restart()
            return restore_from(
                found,
                state,
                wish,
                report=report,
                passed_over=lambda *each: self._saves.stats.passed_over.append(each),
                restored=functools.partial(self._run.restored, whole=keys is None),
            )

    def load(
        self,
        *,
        step: Step | None = None,
        keys: str | Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Any:
        """Return the state of the newest checkpoint that verifies, or of ``step``.

        A run that has restored nothing and saved nothing goes on from the newest one it has loaded.
        See `asyncsave.load` for the arguments.
        """
        with self._turns.take():
            self._turns.check()
            self._saves.raise_unseen()
            self._saves.await_current()
            return load_from(
                self._run.find(step),
                keys=keys,
                device=device,
                passed_over=lambda *each: self._saves.stats.passed_over.append(each),
            )

    def steps(self) -> list[int]:
        """Return the steps of the run's checkpoints, ascending; not those that a rollback left."""
        return sorted(each.step for each in self._run.history().line)

    def latest_step(self) -> int | None:
        """Return the step of the checkpoint that was committed last, or None."""
        line = self._run.history().line
        return line[0].step if line else None

    def best_step(self) -> int | None:
        """Return the best step by the metric of ``keep_best``, or None if none has it.

        Raises:
            ConfigError: there is no ``keep_best``.
        """
        best = self._run.best()
        return best[0] if best else None

    def checkpoints(self, *, verify: bool = False) -> list[CheckpointInfo]:
        """Return what is known of each checkpoint; see `asyncsave.checkpoints`."""
        return list_checkpoints(self._run.history(), verify=verify)

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._run.place.path

    @property
    def should_stop(self) -> bool:
        """Whether a signal has arrived and the state is safe on disk: leave the training loop."""
        return self._should_stop

    # -- inside -------------------------------------------------------------------------------

    def _is_idle(self, step: Any) -> bool:
        """Whether `step` has nothing to do: it is called after every step, and this is quick."""
        return (
            self._has_begun
            and type(step) is int
            and not self._turns.closed
            and not self._signals.arrived
            and not self._cadence.due(step)
            and not self._saves.has_ended
            and not self._turns.is_parents
        )

    def _begin(
        self,
        step: int,
        state: Any,
        files: Files | None,
        metrics: Mapping[str, float] | None,
        metadata: Any,
        *,
        wait: bool = False,
    ) -> SaveHandle | None:
        """Begin a save of the run; None if one is in flight, and this one is skipped."""
        began = time.perf_counter()
        if not self._saves.is_free(wait=wait):
            return None
        notes = Notes.of(metrics, metadata, files)
        self._saves.note_uncertain(self._run.put)
        return self._saves.begin(state, self._run.next(step, notes), began)

    def _give_back(self) -> None:
        if self._signals.arrived and not self._should_stop:
            _log.warning("a signal arrived after the last step; nothing was saved for it")
        self._signals.close()
        super()._give_back()
        self._run.close()
