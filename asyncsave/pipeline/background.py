"""Background: the threads of a pipeline, and how a save is handed over to them.

What happens to a save there is in write.py. This module is about beginnings and ends, which must
hold whatever the caller's thread does: it may be interrupted (Ctrl-C, or a signal's handler that
raises) at any point. So

- a save, or the end, is handed over by one call into C, which is done or not done;
- the threads are started by a thread, which no signal interrupts;
- whatever is raised here ends the handle of the save, and the next one is taken up.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import queue
import selectors
import socket
import threading
from collections.abc import Callable

from ..codec.compression import Compression
from ..errors import AsyncSaveError, ClosedError, SaveError
from ..snapshot.snapshotter import Snapshotter
from .budget import Memory, encoder_threads
from .handle import closed, finish_at_exit, log_exception
from .moment import Moment
from .reuse import Last
from .save import Save, State
from .target import OnDisk
from .workers import Workers
from .write import Writing

_IO_THREADS = 2


class Background:
    """The event loop's thread, the encoders and the io threads. Owned by a `Pipeline`.

    `open`, `wake`, `end` and `close` are called by the pipeline's callers; all else runs in the
    threads.

    Attributes:
        saves: what is to be done, one after the other; None: end.
        over: the end was put there; nothing should follow.
        drained: what is put there from now on is looked at by nobody.
    """

    def __init__(
        self,
        memory: Memory,
        snapshotter: Snapshotter,
        *,
        compression: Compression | None,
        on_disk: OnDisk,
        last: Last,
    ) -> None:
        self.saves: queue.SimpleQueue[Save | None] = queue.SimpleQueue()
        self.over = self.drained = False
        self._memory = memory
        self._snapshotter = snapshotter
        self._compression = compression
        self._on_disk, self._last = on_disk, last
        self._opened, self._ended = Moment(), Moment()
        self._refused: Exception | None = None
        self._then: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: list[Workers] = []
        self._thread: threading.Thread | None = None

    # -- who calls the pipeline ---------------------------------------------------------------

    def open(self) -> None:
        """Start all threads.

        Raises:
            SaveError: the system does not give what that takes; nothing is left of it.
        """
        try:
            try:
                _thread.start_new_thread(self._open, ())
            except RuntimeError as cause:
                self._refuse(cause)
            self._opened.wait()
        except BaseException:  # interrupted: nobody will use it
            self.end()
            raise
        if self._refused is not None:
            why = self._refused
            raise SaveError(
                f"cannot start the threads that save: {why}. Saving takes {_IO_THREADS + 2} to "
                f"{_IO_THREADS + 5} threads and a few descriptors: see ulimit -u and ulimit -n, "
                "and the container's limit of tasks"
            ) from why

    @property
    def is_caller(self) -> bool:
        """Whether the caller is the event loop's thread: a done callback, which must not wait."""
        return threading.current_thread() is self._thread

    def wake(self, save: Save) -> None:
        """Let it look at once what has been staged, or whether the stager has left."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: the save has ended
                self._loop.call_soon_threadsafe(save.wake.set)

    def refuse_rest(self) -> None:
        """End the saves that were handed over when all was over, by another thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (save := self.saves.get_nowait()) is not None:
                    save.stop(self._memory.arenas)
                    save.to(State.FAILED)
                    error = ClosedError(f"closed before {save.target.place} was saved")
                    save.handle._set_error(error, seen=False)

    def end(self, then: Callable[[], None] | None = None) -> None:
        """Let all threads end, and memory be given back, once the saves that were begun have.

        Args:
            then: called in the background after that.
        """
        if then is not None:
            self._then.append(then)
        self.over = True
        self.saves.put(None)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call something in a thread of the background; takes no lock, so signal handlers may."""
        for encode in self._workers[:1]:
            encode.submit(call)

    def close(self) -> None:
        """`end`, and wait for it. Idempotent; it may be called again if it was interrupted."""
        self.end()
        self._ended.wait()
        if self._thread is not None:
            self._thread.join()  # it is at its end: an interrupted join() would not be repeatable

    # -- a thread that starts the others --------------------------------------------------------

    def _open(self) -> None:
        finish_at_exit(self)
        try:
            self._loop = _event_loop()
            self._workers.append(Workers("asyncsave-encode", encoder_threads()))
            self._workers.append(Workers("asyncsave-io", _IO_THREADS))
            thread = threading.Thread(target=self._live, name="asyncsave-loop", daemon=True)
            thread.start()
            self._thread = thread
        except Exception as cause:
            self._refuse(cause)
        self._opened.set()

    def _refuse(self, cause: Exception) -> None:
        self._refused = cause
        self._release()
        self._opened.set()

    # -- event loop thread --------------------------------------------------------------------

    def _live(self) -> None:
        assert self._loop is not None
        try:
            encoders, io = self._workers
            writing = Writing(
                self._memory,
                self._snapshotter,
                compression=self._compression,
                on_disk=self._on_disk,
                last=self._last,
                encoders=encoders,
                io=io,
            )
            while (save := self.saves.get()) is not None:
                self._carry_out(save, self._loop, writing)
                del save  # or it would keep the state's tree until the next one comes
        finally:
            self._release()

    def _carry_out(self, save: Save, loop: asyncio.AbstractEventLoop, writing: Writing) -> None:
        try:
            report = loop.run_until_complete(writing.write(save))
        except BaseException as caught:  # whatever it is, it belongs to who holds the handle
            stopped = save.staging_error
            if isinstance(stopped, Exception):  # what went wrong here is the same failure
                save.handle._set_error(_ours(stopped, save), seen=True)
            else:
                save.handle._set_error(_ours(caught, save), seen=caught is save.left_early)
        else:
            save.handle._set_report(report)

    def _release(self) -> None:
        """Give everything back. Saves that come too late for it fail."""
        self.over = self.drained = True
        self.refuse_rest()
        for workers in self._workers:
            workers.shutdown()
        if self._loop is not None:
            self._loop.close()
        self._memory.close()
        self._snapshotter.forget()
        for each in self._then:
            try:
                each()
            except Exception:
                log_exception("tidying up after the last save failed")
        closed(self)  # last: at exit, what is open is waited for before errors are looked at
        self._ended.set()


def _ours(error: BaseException, save: Save) -> BaseException:
    if isinstance(error, AsyncSaveError):
        return error
    wrapped = SaveError(f"saving {save.target.place} failed: {error!r}")
    wrapped.__cause__ = error
    return wrapped


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return a new one; OSError if there are no descriptors for it, of which none is lost."""
    selector = selectors.DefaultSelector()
    try:
        for each in socket.socketpair():  # as it will open: a loop that cannot does not clean up
            each.close()
        return asyncio.SelectorEventLoop(selector)
    except BaseException:
        selector.close()
        raise
