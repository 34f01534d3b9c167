"""SaveHandle: a save seen from outside; and what happens to saves when the program ends.

A failed save is remembered here until somebody has seen its error. At exit, open saves are
finished; if an error was still not seen, it is printed and the exit status is non-zero.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

from .report import SaveReport

_log = logging.getLogger("asyncsave")


class SaveHandle:
    """A save in the background; like ``concurrent.futures.Future``, and awaitable.

    Any thread may call any method.

    Attributes:
        step: the training step, or None.
        path: where the checkpoint will be.
    """

    def __init__(self, step: int | None, path: Path) -> None:
        self.step = step
        self.path = path
        self._future: Future[SaveReport] = Future()
        self._staged = threading.Event()

    def __repr__(self) -> str:
        state = "running"
        if self.done():
            state = "failed" if self._future.exception() else "durable"
        return f"<SaveHandle step={self.step} {state} {str(self.path)!r}>"

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the snapshot no longer depends on live tensors, at most ``timeout`` seconds.

        Returns whether it is so. Also True once the save has failed.
        """
        return self._staged.wait(timeout)

    def done(self) -> bool:
        """Whether the save has ended: durable, or failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait until the checkpoint is durable and return what it cost.

        Raises:
            TimeoutError: it was not within ``timeout`` seconds; the save goes on.
            SaveError: it was not committed.
            CommitError: it was committed, but not known to be durable.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`; return the error instead of raising it, or None."""
        error = self._future.exception(timeout)
        _unseen.discard(self)
        return error

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Call ``callback(handle)`` when the save has ended, at once if it has.

        It is called in a thread of asyncsave. What it raises is logged.
        """

        def call(_: Future[SaveReport]) -> None:
            try:
                callback(self)
            except BaseException:  # SystemExit, too, would end the event loop
                _log.exception("a done callback of %r raised", self)

        self._future.add_done_callback(call)

    def __await__(self) -> Generator[Any, None, SaveReport]:
        """``await handle`` in any event loop is `result` without blocking the loop."""
        yield from asyncio.wait([asyncio.wrap_future(self._shield())]).__await__()
        return self.result(0)

    def _shield(self) -> Future[None]:
        # cancelling who waits must not cancel the save
        ended: Future[None] = Future()

        def end(_: Future[SaveReport]) -> None:
            if ended.set_running_or_notify_cancel():
                ended.set_result(None)

        self._future.add_done_callback(end)
        return ended

    # -- for the pipeline ---------------------------------------------------------------------

    def set_staged(self) -> None:
        """Note that the snapshot is taken."""
        self._staged.set()

    def set_report(self, report: SaveReport) -> None:
        """End the save well."""
        self._staged.set()
        self._future.set_result(report)

    def set_error(self, error: BaseException, *, seen: bool) -> None:
        """End the save badly. ``seen``: the error was raised to the caller already."""
        if not seen:
            _unseen.add(self)
        self._staged.set()
        self._future.set_exception(error)

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait until the save has ended, well or badly, without looking; return whether it has."""
        return not wait([self._future], timeout).not_done

    def peek(self) -> SaveReport | None:
        """Return the report of a save that has ended; None if it failed."""
        return None if self._future.exception() else self._future.result()

    def peek_error(self) -> BaseException | None:
        """Return the error of a save that has ended, without looking at it for the user."""
        return self._future.exception()

    def take_error(self) -> BaseException | None:
        """Return the error of a save that failed, if nobody has seen it; it counts as seen then."""
        if self not in _unseen:
            return None
        _unseen.discard(self)
        return self._future.exception()


class _Closable(Protocol):
    def close(self) -> None: ...


_unseen: set[SaveHandle] = set()
_open: set[_Closable] = set()


def finish_at_exit(pipeline: _Closable) -> None:
    """Close ``pipeline`` when the program ends, unless `closed` is called before."""
    _open.add(pipeline)


def closed(pipeline: _Closable) -> None:
    """Note that ``pipeline`` needs no closing at exit any more."""
    _open.discard(pipeline)


def _finish() -> None:
    for pipeline in list(_open):
        try:
            pipeline.close()
        except Exception:
            _log.exception("closing a saver at exit failed")
    errors = [error for handle in list(_unseen) if (error := handle.take_error()) is not None]
    if not errors:
        return
    for error in errors:
        print("asyncsave: a save failed, and nobody asked for its result:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
    if getattr(sys, "last_value", None) is not None:
        return  # the training's own exception has set the exit status already
    # nothing but this changes the exit status from here; what it skips is done first
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _forget() -> None:
    # in a forked child the threads do not exist, and the saves are the parent's
    _open.clear()
    _unseen.clear()


atexit.register(_finish)
os.register_at_fork(after_in_child=_forget)
