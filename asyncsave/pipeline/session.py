"""Session: what a Saver and a Checkpointer have in common: a pipeline, turns at it, and an end."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ..codec.compression import CompressionSetting, parse_compression
from ..report import Stats
from .budget import MemoryLimit, parse_limit
from .handle import ends_well
from .pipeline import Pipeline
from .saves import OnBusy, OnError, Saves, check_policies
from .target import OnDisk
from .turns import Turns
from .watchdog import parse_stall_warning

_log = logging.getLogger("asyncsave")


class Session:
    """Owns a pipeline from the making of this object until `close`.

    Raises:
        ConfigError: an argument cannot be.
        SaveError: the threads cannot be started.
    """

    _finalizer: weakref.finalize[Any, Any]

    def __init__(
        self,
        *,
        compression: CompressionSetting,
        memory_limit: MemoryLimit,
        overlap: bool,
        on_disk: OnDisk,
        stall_warning_seconds: float | None,
        on_busy: OnBusy = "wait",
        on_error: OnError = "raise",
    ) -> None:
        check_policies(on_busy, on_error)
        self._pipeline = Pipeline(
            compression=parse_compression(compression),
            memory_limit=parse_limit(memory_limit),
            overlap=overlap,
            on_disk=on_disk,
            stall_warning_seconds=parse_stall_warning(stall_warning_seconds),
        )
        self._saves = Saves(self._pipeline, on_busy, on_error)
        self._turns = Turns(self._pipeline.in_callback, type(self).__name__)

    def _finish_if_dropped(
        self,
        what: str,
        first: Callable[[], None] = lambda: None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """See to it that the end comes, with a warning, should this object be garbage-collected.

        Args:
            what: what it is, for the warning.
            first: called then.
            then: called in the background once the save in flight has ended.
        """
        self._finalizer = weakref.finalize(
            self, _dropped, os.getpid(), self._pipeline, what, first, then
        )
        self._finalizer.atexit = False  # at exit, handle.py finishes what is open

    def __enter__(self) -> Self:
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
            self._close(seen=not ends_well(error))
        except Exception as failure:
            # the training's own exception is the one to see; this one goes with it
            error.add_note(f"asyncsave: a save had failed as well: {failure!r}")
            _log.error("a save failed: %s", failure, exc_info=failure)

    def prewarm(self, state: Any) -> None:
        """Take the memory that saving ``state`` needs now, so that the first save costs no more.

        Optimizers have no state before their first step: call it after that, or the rest comes
        later.
        """
        with self._turns.take():
            self._turns.check()
            self._saves.raise_unseen()
            self._saves.await_current()
            self._pipeline.prewarm(state)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no save is in flight, at most ``timeout`` seconds; return whether that is so.

        Raises:
            SaveError, CommitError: of a save that failed and that nobody has seen.
        """
        with self._turns.take():
            self._turns.check()
            ended = self._saves.await_current(timeout)
            self._saves.raise_unseen()
            return ended

    def close(self) -> None:
        """Finish the save in flight, end all threads, give everything back. Idempotent.

        Raises:
            SaveError, CommitError: of a save that failed and that nobody has seen.
        """
        self._close()

    @property
    def stats(self) -> Stats:
        """Sums over all saves so far."""
        return self._saves.stats

    def _close(self, *, seen: bool = True) -> None:
        if self._turns.is_parents:
            return  # a forked child's copy has nothing
        with self._turns.take():
            if not self._turns.closed:
                # all of it may be done again, by who closes again after an interrupt
                self._give_back()
                self._finalizer.detach()
                self._turns.closed = True
            self._saves.raise_unseen(seen=seen)

    def _give_back(self) -> None:
        """Finish the save in flight, and end all that this object has."""
        self._pipeline.close()


def _dropped(
    pid: int, pipeline: Pipeline, what: str, first: Callable[[], None], then: Callable[[], None]
) -> None:
    """End what belonged to an object that was garbage-collected.

    That may happen in any thread, even in one of the pipeline's, so nobody waits for it.
    """
    if pid != os.getpid():
        return
    first()
    pipeline.end(then)
    warnings.warn(
        f"{what} was dropped without close(); use it in a with statement",
        ResourceWarning,
        stacklevel=2,
    )
