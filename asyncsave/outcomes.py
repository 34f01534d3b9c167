"""Outcomes: the saves of one Checkpointer that have not been looked at, and what all have cost."""

from __future__ import annotations

import logging

from .handle import SaveHandle, raise_unseen
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
        handle.add_done_callback(lambda ended: stats.add(ended._peek()))

    @property
    def has_ended(self) -> bool:
        """Whether a save has ended since the last look."""
        return any(handle.done() for handle in self._handles)

    def raise_unseen(self, current: SaveHandle | None, *, seen: bool = True) -> None:
        """Raise the error of a save that has failed, with those of others in its notes.

        Args:
            current: the save that was begun last; if it was interrupted, it may not have been
                added.
            seen: what is raised counts as seen.
        """
        raise_unseen(self._handles, current, seen=seen)

    def warn_unseen(self, current: SaveHandle | None) -> None:
        """Log the errors of saves that have failed; they count as seen then."""
        try:
            self.raise_unseen(current)
        except Exception as error:
            _log.warning(
                "a save failed, and the training goes on, as on_error='warn' says: %s",
                error,
                exc_info=error,
            )
