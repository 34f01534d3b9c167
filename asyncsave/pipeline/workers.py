"""Workers: a few named threads that run what they are given, as an Executor.

Why not ThreadPoolExecutor: the interpreter shuts all of those down before ``atexit`` handlers run,
so a save that is open when the program ends could not be finished. These threads are daemons, which
live until their owner closes them; the exit handler (handle.py) sees to that.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def call(workers: Executor, function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """Let a thread do something; await it in the event loop."""
    return asyncio.get_running_loop().run_in_executor(workers, function, *args)


class Workers(Executor):
    """``count`` threads named ``name-0``, ``name-1``, …, started at once.

    Any thread may `submit`. The queue is as long as what the pipeline submits, which is bounded by
    its slots and frames.

    Raises:
        RuntimeError: the system lets no more threads start; those that had are gone.
    """

    def __init__(self, name: str, count: int) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for i in range(count):
                thread = threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.shutdown()
            raise

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run ``fn`` in one of the threads."""
        future: Future[_T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:  # handed to whoever waits, as Executors do
                future.set_exception(error)
            except BaseException as error:
                # SystemExit and KeyboardInterrupt end an event loop, whoever handles them in it
                wrapped = RuntimeError(f"{error!r} was raised in a thread of asyncsave")
                wrapped.__cause__ = error
                future.set_exception(wrapped)

        self._tasks.put(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after what was submitted; on return they are gone, if ``wait``."""
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        task: Any
        while (task := self._tasks.get()) is not None:
            task()
            del task  # or it would keep its arguments until the next one comes
