"""SaveHandle: a save seen from outside; and what happens to saves when the program ends.

A failed save is remembered here until somebody has seen its error. At exit, open saves are
finished; if an error was still not seen, it is printed and the exit status is non-zero.

The training thread may be interrupted (Ctrl-C) at any point of a method. So nothing here takes a
lock that the background needs, and an error counts as seen only when nothing can come between that
and its being raised.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

from ..report import SaveReport
from .moment import Moment

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
        self._staged, self._ended = Moment(), Moment()
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[Callable[[SaveHandle], object]] = collections.deque()

    def __repr__(self) -> str:
        state = "running"
        if self.done():
            state = "failed" if self._error else "durable"
        return f"<SaveHandle step={self.step} {state} {str(self.path)!r}>"

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the snapshot no longer depends on live tensors, at most ``timeout`` seconds.

        Returns whether it is so. Also True once the save has failed.
        """
        return self._staged.wait(timeout)

    def done(self) -> bool:
        """Whether the save has ended: durable, or failed."""
        return self._ended.is_set()

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
        assert self._report is not None
        return self._report

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`; return the error instead of raising it, or None."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self.path} is still being saved after {timeout} seconds")
        unseen = self in _unseen
        try:
            _unseen.discard(self)
        except BaseException:  # interrupted: the caller does not get it
            if unseen:
                _unseen.add(self)
            raise
        return self._error

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Call ``callback(handle)`` when the save has ended, at once if it has.

        It is called in a thread of asyncsave; in this one, if the save has ended. What it raises is
        logged.
        """
        self._callbacks.append(callback)
        if self._ended.is_set():
            self._call_back()

    def __await__(self) -> Generator[Any, None, SaveReport]:
        """``await handle`` in any event loop is `result` without blocking the loop."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()  # which may be cancelled; the save may not

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell(_: SaveHandle) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the save
                loop.call_soon_threadsafe(end)

        self.add_done_callback(tell)
        yield from ended.__await__()
        return self.result(0)

    # -- for the pipeline ---------------------------------------------------------------------

    def _set_staged(self) -> None:
        """Note that the snapshot is taken."""
        self._staged.set()

    def _set_report(self, report: SaveReport) -> None:
        """End the save well."""
        self._report = report
        self._end()

    def _set_error(self, error: BaseException, *, seen: bool) -> None:
        """End the save badly. ``seen``: the error was raised to the caller already."""
        self._error = error
        if not seen:
            _unseen.add(self)
        self._end()

    def _end(self) -> None:
        self._staged.set()
        self._ended.set()
        self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:  # another thread has called it
                return
            try:
                callback(self)
            except BaseException:  # SystemExit, too, would end the background
                log_exception("a done callback of %r raised", self)

    def _wait_ended(self, timeout: float | None = None) -> bool:
        """Wait until the save has ended, well or badly, without looking; return whether it has."""
        return self._ended.wait(timeout)

    def _peek(self) -> SaveReport | None:
        """Return the report of a save that has ended; None if it failed."""
        return self._report


def log_exception(message: str, *args: object) -> None:
    """Log an exception that was caught. The background lives on, whatever the logging does."""
    with contextlib.suppress(Exception):  # a filter or a handler of the user's
        _log.exception(message, *args)


class _Closable(Protocol):
    def close(self) -> None: ...


_unseen: set[SaveHandle] = set()
_open: set[_Closable] = set()
_ending = Moment()


def raise_unseen(
    handles: list[SaveHandle], current: SaveHandle | None, *, seen: bool = True
) -> None:
    """Raise the error of those that failed and that nobody has seen; forget all that have ended.

    Args:
        current: the save begun last; if it was interrupted, it may not be among ``handles``.
        seen: what is raised counts as seen.
    """
    failed = _look(handles, current)
    errors = [handle._error for handle in failed if handle._error is not None]
    if not errors:
        return
    for other in errors[1:]:
        errors[0].add_note(f"another save failed as well: {other!r}")
    try:
        raise errors[0]
    finally:
        # An interrupt before this: they are raised at the next chance. After: it has the error as
        # its context, and shows it.
        if seen:
            _unseen.difference_update(failed)


def warn_unseen(handles: list[SaveHandle], current: SaveHandle | None) -> None:
    """Log the errors that `raise_unseen` would raise; they count as seen then.

    They are not raised for it: an error keeps the frames that it was raised through, and those the
    Checkpointer, for as long as anybody has the handle.
    """
    failed = _look(handles, current)
    for handle in failed:
        _log.warning(
            "a save failed, and the training goes on, as on_error='warn' says: %s",
            handle._error,
            exc_info=handle._error,
        )
    _unseen.difference_update(failed)


def _look(handles: list[SaveHandle], current: SaveHandle | None) -> list[SaveHandle]:
    """Return those that failed and that nobody has seen; forget the others that have ended."""
    failed = [each for each in {*handles, current} if each is not None and each in _unseen]
    handles[:] = [handle for handle in handles if not handle.done() or handle in _unseen]
    return failed


def ends_well(error: BaseException) -> bool:
    """Whether a program that ends by this exception ends with status 0.

    Then an error of a save must not count as seen, only since it was noted there: the exit handler
    tells it, and makes the status what it should be.
    """
    return isinstance(error, SystemExit) and error.code in (None, 0)


def finish_at_exit(saver: _Closable) -> None:
    """Close ``saver`` when the program ends, unless `closed` is called before."""
    _open.add(saver)
    if _ending.is_set():
        _LastWord.have()


def closed(saver: _Closable) -> None:
    """Note that ``saver`` needs no closing at exit any more."""
    _open.discard(saver)


def ending() -> bool:
    """Whether the program ends, and nobody will finish what is begun from now on.

    So it is in the exit handlers that were registered before asyncsave was imported: they run after
    its own, and a save that is begun there must end in the call.
    """
    return _ending.is_set()


class _LastWord:
    """Stands in for ``sys.stderr`` when the program ends, to make the exit status non-zero.

    After all exit handlers the interpreter flushes the standard streams, and if that fails the
    status is 120, as is documented with ``sys.exit``. So the last flush fails if an error of a save
    was not seen. ``os._exit`` would skip the exit handlers of other libraries, which remove their
    temporary files and end their processes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        if sys.is_finalizing():
            self.tell()
        self._stream.flush()
        if self._failed and sys.is_finalizing():
            raise RuntimeError("a save failed, and nobody asked for its result")

    def tell(self) -> None:
        """Print the errors that nobody saw."""
        unseen = list(_unseen)
        _unseen.difference_update(unseen)
        for handle in unseen:
            # or else the training's own exception has set the status already
            self._failed = getattr(sys, "last_value", None) is None
            print("asyncsave: a save failed, and nobody asked for its result:", file=self._stream)
            traceback.print_exception(handle._error, file=self._stream)

    @classmethod
    def have(cls) -> _LastWord:
        """Return the one that is in place."""
        if not isinstance(sys.stderr, cls):
            sys.stderr = cls(sys.stderr)
        assert isinstance(sys.stderr, cls)
        return sys.stderr


def _finish() -> None:
    for saver in list(_open):
        try:
            saver.close()
        except Exception:
            _log.exception("closing a saver at exit failed")
    _ending.set()
    if not _unseen:
        return
    if sys.stderr is None or getattr(sys.stderr, "closed", False):
        os._exit(1)  # nobody could be told, and nothing is flushed there
    _LastWord.have().tell()


def _forget() -> None:
    # in a forked child the threads do not exist, and the saves are the parent's
    _open.clear()
    _unseen.clear()


atexit.register(_finish)
os.register_at_fork(after_in_child=_forget)
