"""Signals: a flag that a signal sets, for the next step to see."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from ..errors import ConfigError

_log = logging.getLogger("asyncsave")

Tell = Callable[[Callable[[], None]], object]


class StopSignals:
    """Handles signals from `install` until `close`.

    The first one sets ``arrived``, for the next step to save and stop, and goes on to a handler of
    the program's own. Any further one, and one after `answered`, does what it would have done
    without asyncsave: who asks twice is not waiting for a checkpoint any more.

    The handler does nothing that could interrupt, and then wait for, the thread that it runs in.

    Args:
        numbers: of the signals.

    Raises:
        ConfigError: one of them cannot be handled.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.arrived = False
        self._tell: Tell = lambda _: None
        self._answered = self._closed = self._installed = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}
        try:
            self._wanted = [signal.Signals(number) for number in numbers]
            if {signal.SIGKILL, signal.SIGSTOP} & set(self._wanted):
                raise ValueError("the system does not let SIGKILL and SIGSTOP be handled")
        except (ValueError, TypeError) as cause:
            raise ConfigError(
                f"signals={numbers!r} cannot be handled: {cause}. Give signals, as in "
                "(signal.SIGTERM,), or () for none"
            ) from cause

    def install(self, tell: Tell) -> None:
        """Handle the signals from now on; called by the training loop's first step.

        Not before, since who never calls `step` would wait in vain for what a signal is to do; and
        not in a notebook, which outlives its loops.

        Args:
            tell: called by the handler with a function that logs a line: it must run that in
                another thread, and take no lock.
        """
        if self._installed:
            return
        self._tell = tell
        if not self._wanted or _in_notebook():
            self._installed = True
            return
        if threading.current_thread() is not threading.main_thread():
            _log.warning("signals are not handled: this is not the main thread")
            self._installed = True
            return
        for number in self._wanted:
            try:
                self._previous[number] = signal.getsignal(number)  # before: an interrupt loses none
                signal.signal(number, self._handle)
            except BaseException as cause:
                self._put_back()
                if not isinstance(cause, (OSError, ValueError, TypeError)):
                    raise
                raise ConfigError(f"signals: {number!r} cannot be handled: {cause}") from cause
        self._installed = True

    def answered(self) -> None:
        """Note that the state is safe: another signal must not wait for that again."""
        self._answered = True

    def close(self) -> None:
        """Put the previous handlers back, where nobody has replaced ours.

        Only the main thread can; called in another one, handlers stay and do what the previous ones
        would have done.
        """
        self._closed = True
        self._put_back()

    def _put_back(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in list(self._previous.items()):
            if signal.getsignal(number) == self._handle:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL if previous is None else previous)
                    del self._previous[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        first = not (self.arrived or self._answered or self._closed or self._pid != os.getpid())
        self.arrived = True
        name = signal.Signals(number).name
        if first:
            self._tell(lambda: _log.info("%s arrived: saving at the next step", name))
            if callable(previous) and previous is not signal.default_int_handler:
                previous(number, frame)
        elif callable(previous):
            previous(number, frame)
        elif previous in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "ipykernel" in sys.modules
