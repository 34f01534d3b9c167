"""Saves: begun one after the other, waited for, and their errors told, once each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..errors import BusyError, CommitError, ConfigError, SaveError
from ..report import Stats
from .handle import SaveHandle, raise_unseen, warn_unseen
from .pipeline import Pipeline
from .target import Target

OnBusy = Literal["wait", "skip", "error"]
OnError = Literal["raise", "warn"]


def check_policies(on_busy: str, on_error: str) -> None:
    """Raise ConfigError for what `Saves` does not know."""
    if on_busy not in ("wait", "skip", "error"):
        raise ConfigError(f"on_busy={on_busy!r} must be 'wait', 'skip' or 'error'")
    if on_error not in ("raise", "warn"):
        raise ConfigError(f"on_error={on_error!r} must be 'raise' or 'warn'")


class Saves:
    """Begins a pipeline's saves, and keeps their handles until their errors were seen.

    Called by one thread at a time; but `stats` are counted in the thread that ends a save.

    Args:
        on_busy: what `is_free` does while a save is in flight.
        on_error: what `tell_unseen` does.
    """

    def __init__(self, pipeline: Pipeline, on_busy: OnBusy, on_error: OnError) -> None:
        self.stats = Stats()
        self._pipeline = pipeline
        self._on_busy, self._on_error = on_busy, on_error
        self._handles: list[SaveHandle] = []
        self._begun: tuple[SaveHandle, Target] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether a save has ended since the last look."""
        return bool(self._handles) and any(handle.done() for handle in self._handles)

    def is_free(self, *, wait: bool = False) -> bool:
        """Whether a save may begin now: wait for the one in flight, or skip, as ``on_busy`` says.

        Args:
            wait: for the one in flight, whatever ``on_busy`` says.

        Raises:
            BusyError: ``on_busy`` is "error", and one is in flight.
        """
        current = self._pipeline.current
        if current is not None and not current.done():
            if self._on_busy == "skip" and not wait:
                self.stats.skipped += 1
                return False
            if self._on_busy == "error" and not wait:
                raise BusyError(
                    f"the save of step {current.step} is still being written; wait(), save less "
                    "often, or choose on_busy='wait' or 'skip'"
                )
            self.await_current()
        if current is not None and current._error is not None and current not in self._handles:
            self._handles.append(current)  # one that was interrupted before it could be kept
        return True

    def begin(self, state: Any, target: Target, began: float) -> SaveHandle:
        """Begin a save; none is in flight.

        Args:
            began: when its caller was called (``time.perf_counter``).

        Raises:
            StateError, ConfigError, SaveError: nothing was begun.
        """
        try:
            handle = self._pipeline.save(state, target, began)
        except SaveError:
            self.stats.failures += 1
            raise
        self._begun = handle, target
        self._handles.append(handle)
        stats = self.stats
        handle.add_done_callback(lambda ended: stats.add(ended._peek()))
        return handle

    def note_uncertain(self, note: Callable[[Target], None]) -> None:
        """Tell ``note`` what the last save has put in place, if it is not known to be durable."""
        if self._begun is not None and isinstance(self._begun[0]._error, CommitError):
            note(self._begun[1])
        self._begun = None

    def await_current(self, timeout: float | None = None) -> bool:
        """Wait until no save is in flight, at most ``timeout`` seconds; return whether it is so."""
        current = self._pipeline.current
        return current is None or current._wait_ended(timeout)

    def raise_unseen(self, *, but: SaveHandle | None = None, seen: bool = True) -> None:
        """Raise the error of a save that has failed, with those of others in its notes.

        Args:
            but: not this one's.
            seen: what is raised counts as seen.
        """
        handles, current = self._others(but)
        raise_unseen(handles, current, seen=seen)
        self._handles = handles if but is None else [*handles, but]

    def tell_unseen(self, *, but: SaveHandle | None) -> None:
        """Raise or log such errors, as ``on_error`` says, while another save was begun."""
        if self._on_error == "raise":
            self.raise_unseen(but=but)
            return
        handles, current = self._others(but)
        warn_unseen(handles, current)
        self._handles = handles if but is None else [*handles, but]

    def _others(self, but: SaveHandle | None) -> tuple[list[SaveHandle], SaveHandle | None]:
        current = self._pipeline.current
        return [each for each in self._handles if each is not but], (
            None if current is but else current
        )
