"""Saves: those of one run, begun one after the other, waited for, and their errors told."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import BusyError, CommitError, ConfigError, SaveError
from ..format.notes import encode_plain, parse_metrics
from ..pipeline.handle import SaveHandle, raise_unseen, warn_unseen
from ..pipeline.pipeline import Pipeline
from ..pipeline.save import Target
from ..report import Stats
from ..storage.steps import step_path
from .directory import RunDirectory

OnBusy = Literal["wait", "skip", "error"]
OnError = Literal["raise", "warn"]


class Saves:
    """Begins a run's saves, and keeps their handles until their errors were seen, once each.

    Called by one thread at a time; but `stats` are counted in the thread that ends a save.

    Raises:
        ConfigError: an argument cannot be.
    """

    def __init__(self, run: RunDirectory, on_busy: OnBusy, on_error: OnError) -> None:
        if on_busy not in ("wait", "skip", "error"):
            raise ConfigError(f"on_busy={on_busy!r} must be 'wait', 'skip' or 'error'")
        if on_error not in ("raise", "warn"):
            raise ConfigError(f"on_error={on_error!r} must be 'raise' or 'warn'")
        self.stats = Stats()
        self.pipeline: Pipeline | None = None
        self._run = run
        self._on_busy, self._on_error = on_busy, on_error
        self._handles: list[SaveHandle] = []
        self._begun: tuple[SaveHandle, Target] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether a save has ended since the last look."""
        return bool(self._handles) and any(handle.done() for handle in self._handles)

    def begin(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None,
        metadata: Any,
        *,
        wait: bool = False,
    ) -> SaveHandle | None:
        """Begin a save; return None if one is in flight and ``on_busy`` says to skip this one.

        Args:
            wait: for the one in flight, whatever ``on_busy`` says.
        """
        assert self.pipeline is not None
        began = time.perf_counter()
        numbers, plain = parse_metrics(metrics), encode_plain(metadata, "metadata")
        current = self.pipeline.current
        if current is not None and not current.done():
            if self._on_busy == "skip" and not wait:
                self.stats.skipped += 1
                return None
            if self._on_busy == "error" and not wait:
                raise BusyError(
                    f"the save of step {current.step} is still being written; wait(), save less "
                    "often, or choose on_busy='wait' or 'skip'"
                )
            self.await_current()
        if current is not None and current._error is not None and current not in self._handles:
            self._handles.append(current)  # one that was interrupted before it could be kept
        self.note_uncertain()
        target = self._target(step, numbers, plain)
        try:
            handle = self.pipeline.save(state, target, began)
        except SaveError:
            self.stats.failures += 1
            raise
        self._begun = handle, target
        self._handles.append(handle)
        stats = self.stats
        handle.add_done_callback(lambda ended: stats.add(ended._peek()))
        return handle

    def _target(self, step: int, metrics: dict[str, float | None], metadata: object) -> Target:
        turn = self._run.next(step)
        self._run.warn_of_metrics(step, metrics)
        return Target(
            path=step_path(self._run.path, step),
            step=step,
            lineage=turn.lineage,
            replace=turn.replaces,
            metrics=metrics,
            metadata=metadata,
            then=functools.partial(self._run.committed, step, turn.lineage),
        )

    def note_uncertain(self) -> None:
        """A checkpoint that was put in place, if not known to be durable, is the last one, too."""
        if self._begun is not None and isinstance(self._begun[0]._error, CommitError):
            step = self._begun[0].step
            assert step is not None
            self._run.go_on_from(step, self._begun[1].lineage)
        self._begun = None

    def await_current(self, timeout: float | None = None) -> bool:
        """Wait until no save is in flight, at most ``timeout`` seconds; return whether it is so."""
        current = None if self.pipeline is None else self.pipeline.current
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
        current = None if self.pipeline is None else self.pipeline.current
        return [each for each in self._handles if each is not but], (
            None if current is but else current
        )
