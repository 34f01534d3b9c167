"""Signals: a flag that a signal sets, for the next step to see."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from .errors import ConfigError

_log = logging.getLogger("asyncsave")


class StopSignals:
    """Handles signals from its making until `close`, and calls the handlers that were there before.

    The handler does nothing but set ``arrived``: anything more could interrupt, and then wait for,
    the thread that it runs in.

    Args:
        numbers: of the signals.

    Raises:
        ConfigError: one of them cannot be handled.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.arrived = False
        self._closed = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}
        wanted = list(numbers)
        if wanted and threading.current_thread() is not threading.main_thread():
            _log.warning("signals are not handled: this is not the main thread")
            return
        for number in wanted:
            try:
                self._previous[number] = signal.getsignal(number)  # before: an interrupt loses none
                signal.signal(number, self._handle)
            except BaseException as cause:
                self.close()
                if not isinstance(cause, (OSError, ValueError, TypeError)):
                    raise
                raise ConfigError(f"signals: {number!r} cannot be handled: {cause}") from cause

    def close(self) -> None:
        """Put the previous handlers back, where nobody has replaced ours.

        Only the main thread can; called in another one, handlers stay and do what the previous ones
        would have done.
        """
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in list(self._previous.items()):
            if signal.getsignal(number) == self._handle:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL if previous is None else previous)
                    del self._previous[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True
        previous = self._previous.get(number)
        forked = self._pid != os.getpid()
        if callable(previous):
            previous(number, frame)
        elif previous in (signal.SIG_DFL, None) and (self._closed or forked):
            # nobody will look at the flag: let the signal do what it does without us
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
