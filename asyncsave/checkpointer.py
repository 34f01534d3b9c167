"""Checkpointer: one training run's checkpoints. When to save, what to keep, how to stop.

Everything here runs in the thread that calls it, and a lock lets several threads call. What the
saves do in the background is the pipeline's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from .cadence import Cadence
from .codec.choose import CompressionSetting, parse_compression
from .errors import (
    BusyError,
    ClosedError,
    ConfigError,
    SaveError,
)
from .handle import SaveHandle
from .memory import MemoryLimit, parse_limit
from .pipeline import Pipeline
from .report import RestoreReport, Stats
from .restore import PathLike, Wish, load_from, restore_from
from .signals import StopSignals
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.manifest import encode_plain
from .storage.retention import KeepBest, Policy, Retention, parse_metrics
from .storage.steps import step_path
from .task import Target
from .watchdog import STALL_WARNING_SECONDS, parse_stall_warning

_log = logging.getLogger("asyncsave")

OnBusy = Literal["wait", "skip", "error"]


class Checkpointer:
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

    The directory belongs to one Checkpointer at a time. Methods may be called from any thread; each
    call that touches saves first raises the error of a background save that failed and was not yet
    seen. Only a done callback must not call them: it would wait for itself, and gets a BusyError.
    Close it, or use it in a ``with`` statement: one that is merely dropped finishes its save, frees
    its threads and its directory, and warns (ResourceWarning).

    Args:
        directory: where checkpoints go, made if need be. What a killed run left half-written is
            removed.
        every_steps: `step` saves when the step is a multiple of this.
        every_seconds: `step` saves when this much time has passed since the last save began.
        keep_last: keep the newest so many.
        keep_every: keep those whose step is a multiple of this.
        keep_best: keep the best by a metric given to `step`: its name (lowest is best), or a tuple
            of name, "min" or "max", and how many. A checkpoint stays if any rule keeps it; without
            rules all stay. Nothing is removed before what replaces it is durable.
        compression: "auto", "off", a level from 0 to 22, or a `Compression`.
        memory_limit: most bytes to use beside the state; "auto" is the whole state if that is at
            most half of the available memory, else that half. With less than the state, it is
            copied in waves.
        on_busy: when a save is due and the last one still runs: "wait" for it, "skip" this one, or
            raise an "error" (BusyError).
        overlap: copy device tensors that only the optimizer changes during the next forward and
            backward pass. Off: everything is copied before `save` returns.
        signals: on one of these, the next `step` saves, waits until durable and sets `should_stop`.
        durable: sync files and directories, so that what is reported done survives a power cut.
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
        on_busy: OnBusy = "wait",
        overlap: bool = True,
        signals: Iterable[int] = (signal.SIGTERM,),
        durable: bool = True,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
    ) -> None:
        self._cadence = Cadence(every_steps, every_seconds)
        policy = Policy.parse(keep_last, keep_every, keep_best)
        setting, limit = parse_compression(compression), parse_limit(memory_limit)
        if on_busy not in ("wait", "skip", "error"):
            raise ConfigError(f"on_busy={on_busy!r} must be 'wait', 'skip' or 'error'")
        self._on_busy = on_busy
        self._directory = Path(os.path.abspath(directory))
        self._filesystem: FileSystem = LocalFileSystem()
        self._mutex = threading.RLock()
        self._stats = Stats()
        self._pid = os.getpid()
        self._closed = False
        self._handles: list[SaveHandle] = []
        self._should_stop = False
        with contextlib.ExitStack() as undo:
            self._retention = Retention(self._filesystem, self._directory, policy)
            undo.callback(self._retention.close)
            self._signals = StopSignals(signals)
            undo.callback(self._signals.close)
            self._pipeline = Pipeline(
                self._filesystem,
                compression=setting,
                memory_limit=limit,
                overlap=overlap,
                durable=durable,
                stall_warning_seconds=parse_stall_warning(stall_warning_seconds),
            )
            undo.pop_all()
        self._finalizer = weakref.finalize(
            self, _abandoned, self._pid, self._pipeline, self._retention, self._signals
        )
        self._finalizer.atexit = False  # at exit, handle.py finishes what is open

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:
            # the training's own exception is the one to see; this one goes with it
            error.add_note(f"asyncsave: a save had failed as well: {failure!r}")
            _log.error("a save failed: %s", failure, exc_info=failure)

    # -- saving -------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
    ) -> SaveHandle | None:
        """Save ``state`` if it is due; call after every training step.

        It is due when ``every_steps`` or ``every_seconds`` says so, and when a signal has arrived:
        then this call waits until the checkpoint is durable, and `should_stop` is true on return.

        Args:
            step: the training step that ``state`` is after.
            metrics: numbers to store, which ``keep_best`` may go by.
            metadata: plain JSON to store in ``checkpoint.json``.

        Returns:
            The handle of the save that was begun, or None.

        Raises:
            What `save` raises, and the error of an earlier save that nobody has seen.
        """
        with self._turn():
            if self._signals.arrived and not self._should_stop:
                handle = self._save(step, state, metrics, metadata, on_busy="wait")
                assert handle is not None
                handle.result()
                self._should_stop = True
                return handle
            if not self._cadence.due(step):
                return None
            return self._save(step, state, metrics, metadata, on_busy=self._on_busy)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
        block: bool = False,
    ) -> SaveHandle | None:
        """Save ``state`` now.

        On return the snapshot is taken, except for copies that are allowed until the fence; with
        ``block``, the checkpoint is durable.

        Returns:
            The handle; None only if a save is in flight and ``on_busy="skip"``.

        Raises:
            StateError, StagingError, ConfigError: this state was not saved.
            CheckpointExistsError: this step was saved already.
            BusyError: a save is in flight and ``on_busy="error"``.
            SaveError, CommitError: with ``block``, this save's; else one of an earlier save.
        """
        with self._turn():
            handle = self._save(step, state, metrics, metadata, on_busy=self._on_busy)
        if block and handle is not None:
            handle.result()
        return handle

    def prewarm(self, state: Any) -> None:
        """Take the memory that saving ``state`` needs now, so that the first save costs no more.

        Optimizers have no state before their first step: call it after that, or the rest comes
            later.
        """
        with self._turn():
            self._await_current()
            self._pipeline.prewarm(state)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no save is in flight, at most ``timeout`` seconds; return whether that is so.

        Raises:
            SaveError, CommitError: of a save that failed and that nobody has seen.
        """
        with self._turn():
            current = self._pipeline.current
            ended = current is None or current.wait_ended(timeout)
            self._raise_unseen()
            return ended

    def close(self) -> None:
        """Finish the save in flight, end all threads, give everything back. Idempotent.

        Raises:
            SaveError, CommitError: of a save that failed and that nobody has seen.
        """
        if self._pid != os.getpid():
            return  # a forked child's copy has nothing
        self._refuse_callbacks()
        with self._mutex:
            if self._closed:
                return
            self._finalizer.detach()
            self._signals.close()
            self._pipeline.close()
            self._retention.close()
            self._closed = True
            self._raise_unseen()

    # -- restoring ----------------------------------------------------------------------------

    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        strict: bool = True,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
        report: Callable[[RestoreReport], None] | None = None,
    ) -> int | None:
        """Fill ``state`` from the newest checkpoint that verifies, or ``step``'s; return its step.

        See `asyncsave.restore` for how, and for the arguments. If the run has no checkpoint, the
        result is None. Damaged ones that were passed over are logged, and in ``stats.passed_over``.

        Raises:
            LoadError: as `asyncsave.restore`; damage only if all checkpoints are damaged.
        """
        wish = Wish.parse(strict=strict, keys=keys, rename=rename, cast=cast)
        with self._turn():
            self._await_current()
            if step is None and not self.steps():
                return None
            self._retention.restored = restored = restore_from(
                self._filesystem,
                self._retention.path(step),
                state,
                wish,
                report=report,
                passed_over=lambda *each: self._stats.passed_over.append(each),
            )
            self._cadence.restart()
            return restored

    def load(
        self,
        *,
        step: int | None = None,
        keys: str | Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Any:
        """Return the state of the newest checkpoint that verifies, or of ``step``.

        See `asyncsave.load` for the arguments.
        """
        with self._turn():
            self._await_current()
            return load_from(
                self._filesystem,
                self._retention.path(step),
                keys=keys,
                device=device,
                passed_over=lambda *each: self._stats.passed_over.append(each),
            )

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints in the directory, ascending."""
        return self._retention.steps()

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._directory

    @property
    def should_stop(self) -> bool:
        """Whether a signal has arrived and the state is safe on disk: leave the training loop."""
        return self._should_stop

    @property
    def stats(self) -> Stats:
        """Sums over all saves so far."""
        return self._stats

    # -- inside -------------------------------------------------------------------------------

    def _save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None,
        metadata: Any,
        *,
        on_busy: OnBusy,
    ) -> SaveHandle | None:
        began = time.perf_counter()
        if type(step) is not int or not 0 <= step < 10**18:
            raise ConfigError(f"step={step!r} must be an int from 0 on")
        numbers = parse_metrics(metrics or {})
        encode_plain(metadata, "metadata")
        current = self._pipeline.current
        if current is not None and not current.done():
            if on_busy == "skip":
                self._stats.skipped += 1
                return None
            if on_busy == "error":
                raise BusyError(
                    f"the save of step {current.step} is still being written; wait(), save less "
                    "often, or choose on_busy='wait' or 'skip'"
                )
            self._await_current()
            self._raise_unseen()
        target = Target(
            step_path(self._directory, step),
            step,
            self._retention.may_replace(step),
            numbers,
            metadata,
            functools.partial(self._retention.committed, step, numbers),
        )
        self._cadence.restart()
        try:
            handle = self._pipeline.save(state, target, began)
        except SaveError:
            self._stats.failures += 1
            raise
        self._handles.append(handle)
        handle.add_done_callback(functools.partial(_count, self._stats))
        return handle

    def _await_current(self) -> None:
        if self._pipeline.current is not None:
            self._pipeline.current.wait_ended()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Give one thread after the other its turn, if there is anything left to do."""
        if self._pid != os.getpid():  # before the lock, which a thread of the parent may have held
            raise ClosedError("this Checkpointer belongs to the parent process; make one here")
        self._refuse_callbacks()
        with self._mutex:
            if self._closed:
                raise ClosedError("this Checkpointer is closed; make a new one")
            self._raise_unseen()
            yield

    def _refuse_callbacks(self) -> None:
        if self._pipeline.in_callback:
            raise BusyError(
                "a done callback cannot use its Checkpointer, whose saves wait for the callback to "
                "return; hand over to a thread of your own"
            )

    def _raise_unseen(self) -> None:
        ended = [handle for handle in self._handles if handle.done()]
        self._handles = [handle for handle in self._handles if not handle.done()]
        errors = [error for handle in ended if (error := handle.take_error()) is not None]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"another save failed as well: {other!r}")
            raise errors[0]


def _count(stats: Stats, handle: SaveHandle) -> None:
    stats.add(handle.peek())


def _abandoned(pid: int, pipeline: Pipeline, retention: Retention, signals: StopSignals) -> None:
    """Close what belonged to a Checkpointer that was garbage-collected.

    That may happen in any thread, even in one of the pipeline's, so a thread of its own waits.
    """
    if pid != os.getpid():
        return
    signals.close()

    def close() -> None:
        pipeline.close()
        retention.close()

    threading.Thread(target=close, name="asyncsave-close", daemon=True).start()
    warnings.warn(
        f"the Checkpointer of {retention.directory} was dropped without close(); use it in a with "
        "statement",
        ResourceWarning,
        stacklevel=2,
    )
