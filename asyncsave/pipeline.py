"""Pipeline: one save, from live state to committed checkpoint.

    training thread          encoders                event loop thread         io threads
    flatten, plan, stage ──▶ digest, planes, zstd ──▶ append, in plan order ──▶ write(2), fsync
          ▲                        ▲                                            commit
          └── slots ───────────────┴── frames: whoever wants one waits for it ──┘

This module is the training thread's part, background.py all else.

What bounds it: a chunk is somewhere only if it has a slot or a frame, and there are as many of both
as the budget allows. Queues between the stages are no longer than that. One save is at work at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from .background import Background
from .codec.choose import Compression
from .errors import StagingError
from .handle import SaveHandle, closed, finish_at_exit
from .memory import Memory
from .snapshot.fence import FENCE, CudaTransport, LateCopies, Transport
from .snapshot.snapshotter import Snapshotter, Staged
from .state.plan import Plan, Planner
from .state.tree import Flat, flatten
from .storage.filesystem import FileSystem
from .task import Save, Target
from .watchdog import STALL_WARNING_SECONDS, Watchdog


class Pipeline:
    """The threads and the memory that saves need. Owned by a Checkpointer, or by one ``save``.

    `save`, `prewarm` and `close` are called by one thread at a time.

    Args:
        once: the pipeline closes itself when its first save has ended.
        transport: how device tensors are copied; None: CUDA's, where CUDA is.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        compression: Compression | None,
        memory_limit: int | Literal["auto"],
        overlap: bool,
        durable: bool,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
        once: bool = False,
        transport: Transport | None = None,
    ) -> None:
        if transport is None and torch.cuda.is_available():
            transport = CudaTransport()
        self._memory = Memory(memory_limit, compression)
        self._stall_warning_seconds = stall_warning_seconds
        self._planner = Planner()
        self._snapshotter = Snapshotter(transport, overlap=overlap)
        self._current: SaveHandle | None = None
        self._background = Background(
            filesystem,
            self._memory,
            self._snapshotter,
            compression=compression,
            durable=durable,
            once=once,
            ended=lambda: closed(self),
        )
        finish_at_exit(self)

    @property
    def current(self) -> SaveHandle | None:
        """The save that was begun last."""
        return self._current

    @property
    def in_callback(self) -> bool:
        """Whether the caller is the event loop's thread: a done callback, which must not wait."""
        return self._background.is_caller

    def save(self, state: Any, target: Target, began: float) -> SaveHandle:
        """Stage ``state`` and let the rest happen in the background. No other save is in flight.

        Args:
            began: when the caller was called (``time.perf_counter``); times are counted from there.

        Raises:
            StateError, ConfigError: nothing was begun.
            StagingError: the snapshot could not be taken; nothing was committed.
        """
        flat = flatten(state)
        plan = self._fit(flat)
        handle = SaveHandle(target.step, target.path)
        watchdog = Watchdog(target.path, self._stall_warning_seconds)
        save = Save(target, flat, plan, handle, watchdog, began)
        if any(chunk.late for chunk in plan.chunks) and self._snapshotter.transport is not None:
            save.late = LateCopies(self._snapshotter.transport)
        self._current = handle
        self._background.start(save)
        try:
            self._stage(flat, save)
        except BaseException as error:
            save.staging_error = error
            save.fail(self._memory.arenas)
            raise
        finally:
            save.blocked_seconds = save.elapsed()
            self._background.feed(save, [None])
            save.staging_over.set()
        return handle

    def call_soon(self, call: Callable[[], None]) -> None:
        """Let the background call something; a signal's handler may ask for it."""
        self._background.call_soon(call)

    def prewarm(self, state: Any) -> None:
        """Take (and pin) the memory that saving ``state`` will need, without saving it."""
        self._fit(flatten(state))
        for arena in self._memory.arenas:
            arena.touch()

    def close(self) -> None:
        """Finish the save in flight, end all threads, give all memory back. Idempotent."""
        if self._current is not None:
            self._current.wait_ended()
        self._background.close()

    def _fit(self, flat: Flat) -> Plan:
        """Plan a state, and make memory fit the plan."""
        late = self._snapshotter.late(flat)
        chunk_bytes = self._memory.chunk_bytes
        plan = self._planner.plan(flat, chunk_bytes, late)
        if self._memory.fit(plan.groups, pin=self._snapshotter.on_device(flat)):
            self._snapshotter.forget()
        if self._memory.chunk_bytes != chunk_bytes:
            plan = self._planner.plan(flat, self._memory.chunk_bytes, late)
            self._memory.fit(plan.groups, pin=self._snapshotter.on_device(flat))
        return plan

    def _stage(self, flat: Flat, save: Save) -> None:
        """Copy all chunks into slots, in waves if there are fewer slots than chunks."""
        slots = self._memory.slots
        assert slots is not None
        ready: list[Staged | None] = []
        unfinished = []
        for chunk in sorted(save.plan.chunks, key=lambda chunk: (chunk.late, chunk.index)):
            slot = save.hold(slots, slots.acquire(chunk.index, wait=False))
            if slot is None:
                # Only now: as long as slots are free, the copy has the cores and the GIL to itself.
                self._background.feed(save, ready)
                ready = []
                slot = save.hold(slots, slots.acquire(chunk.index, give_up=save.failed.is_set))
                if slot is None:
                    return  # the save has failed meanwhile, and its handle says why
            staged = self._snapshotter.stage(flat, save.plan, chunk, slot, save.late)
            ready.append(staged)
            if staged.event is not None and staged.late is None:
                unfinished.append(staged.event)
        if save.late is not None:
            FENCE.add(save.late)
        try:
            for event in unfinished:
                event.synchronize()
        except RuntimeError as cause:
            raise StagingError(f"a copy from the device failed: {cause}") from cause
        if save.late is None:
            save.note_staged()
        self._background.feed(save, ready)
