"""Outcomes: the saves of one Checkpointer that have not been looked at, and what all have cost."""

from __future__ import annotations

import logging

from .handle import SaveHandle
from .report import Stats

_log = logging.getLogger("asyncsave")


class Outcomes:
    """Keeps handles until their saves have ended and their errors were seen, once each.

    Called by one thread at a time; but `stats` are counted in the thread that ends a save.
    """

    def __init__(self) -> None:
        self.stats = Stats()
        self._handles: list[SaveHandle] = []

    def add(self, handle: SaveHandle) -> None:
        """Keep a save that was begun."""
        self._handles.append(handle)
        stats = self.stats
        handle.add_done_callback(lambda ended: stats.add(ended.peek()))

    @property
    def has_ended(self) -> bool:
        """Whether a save has ended since the last look."""
        return any(handle.done() for handle in self._handles)

    def raise_unseen(self) -> None:
        """Raise the error of a save that has failed, with those of others in its notes."""
        errors = self._take()
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"another save failed as well: {other!r}")
            raise errors[0]

    def warn_unseen(self) -> None:
        """Log the errors of saves that have failed; they count as seen then."""
        for error in self._take():
            _log.warning(
                "a save failed, and the training goes on, as on_error='warn' says: %s",
                error,
                exc_info=error,
            )

    def _take(self) -> list[BaseException]:
        ended = [handle for handle in self._handles if handle.done()]
        self._handles = [handle for handle in self._handles if not handle.done()]
        return [error for handle in ended if (error := handle.take_error()) is not None]
