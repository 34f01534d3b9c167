"""Pipeline: one save, from live state to committed checkpoint.

    training thread          encoders                event loop thread         io threads
    flatten, plan, stage ──▶ digest, planes, zstd ──▶ append, in plan order ──▶ write(2), fsync
          ▲                        ▲                                            commit
          └── slots ───────────────┴── frames: whoever wants one waits for it ──┘

This module is the training thread's part, encode.py and write.py all else; background.py is what is
between.

What bounds it: a chunk is somewhere only if it has a slot or a frame, and there are as many of both
as the budget allows. Queues between the stages are no longer than that. One save is at work at a
time.

Interrupts: a signal's handler may raise in the training thread between any two of its instructions,
more exactly: when a function is entered, after a call, and at the end of a loop's turn. What is
shared with the background is changed in single steps that hold wherever that happens (`Save`,
`Arena.reclaim`, `Moment`); what only this thread uses is made anew by the next save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..codec.compression import Compression
from ..errors import ClosedError, SaveError, StagingError
from ..snapshot.fence import FENCE, CudaTransport, LateCopies, Transport
from ..snapshot.snapshotter import Snapshotter, Staged
from ..state.changes import Stepped, Stillness, Versions
from ..state.chunks import Plan
from ..state.flatten import Flat, flatten
from ..state.layout import Layout, Layouts
from .background import Background
from .budget import Memory
from .handle import SaveHandle, ending
from .reuse import Last
from .save import Save, Snapshot
from .target import OnDisk, Target
from .watchdog import STALL_WARNING_SECONDS, Watchdog


class Pipeline:
    """The threads and the memory that saves need. Owned by a Saver, which may be a
    Checkpointer's, or by one ``save``.

    `save`, `prewarm` and `close` are called by one thread at a time. One that is dropped ends its
    threads once its last save has ended.

    Args:
        transport: how device tensors are copied; None: CUDA's, where CUDA is.

    Raises:
        SaveError: the threads cannot be started.
    """

    def __init__(
        self,
        *,
        compression: Compression | None,
        memory_limit: int | Literal["auto"],
        overlap: bool,
        on_disk: OnDisk,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
        transport: Transport | None = None,
    ) -> None:
        if transport is None and torch.cuda.is_available():
            transport = CudaTransport()
        self._memory = Memory(memory_limit, compression)
        self._stall_warning_seconds = stall_warning_seconds
        self._layouts: Layouts | None = None
        self._plan: Plan | None = None
        self._stillness: Stillness | None = None
        self._last, self._reuse = Last(), on_disk.reuse
        self._stepped = Stepped() if on_disk.reuse == "versions" else None
        self._snapshotter = Snapshotter(transport)
        self._overlap = overlap
        self._current: SaveHandle | None = None
        self._background = Background(
            self._memory,
            self._snapshotter,
            compression=compression,
            on_disk=on_disk,
            last=self._last,
        )
        self._background.open()

    def __del__(self) -> None:
        if hasattr(self, "_background"):
            self._background.saves.put(None)

    @property
    def current(self) -> SaveHandle | None:
        """The save that was begun last."""
        return self._current

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
        self._refuse_closed()
        grad = torch.is_grad_enabled()
        try:
            handle = self._save(state, target, began)
        finally:
            # An interrupt in torch's no_grad() leaves gradients off, for all the training to come.
            torch._C._set_grad_enabled(grad)
        if ending():
            handle._wait_ended()  # nobody else will
        return handle

    def _save(self, state: Any, target: Target, began: float) -> SaveHandle:
        flat, plan = self._fit(state)
        path = target.place.path
        handle = SaveHandle(target.step, path)
        watchdog = Watchdog(path, self._stall_warning_seconds)
        save = Save(target, flat, plan, handle, watchdog, began)
        if self._stepped is not None:
            self._skip_unchanged(flat, save, self._stepped)
        if any(chunk.late for chunk in plan.chunks) and self._snapshotter.transport is not None:
            save.late = LateCopies(self._snapshotter.transport)
        try:
            with save.staging:
                # One step: from here on the save ends, whatever happens. An interrupt comes before
                # the first line or after the second, as there is no call between them.
                self._current = handle
                self._background.saves.put(save)
                self._take(flat, save)
        finally:
            self._background.wake(save)
        return handle

    def _skip_unchanged(self, flat: Flat, save: Save, stepped: Stepped) -> None:
        """Note which chunks are as they were in the last checkpoint, and need not be copied."""
        last, save.versions = self._last, Versions(flat, stepped)
        if last.plan is not save.plan or last.versions is None or last.base is None:
            return
        is_there = last.base.is_there()
        for index in save.versions.unchanged(last.versions, save.plan):
            record = last.chunks[index]
            if is_there[record.file]:
                save.reused[index] = record
                save.taken.add((record.file, record.offset))

    def _take(self, flat: Flat, save: Save) -> None:
        """Take the snapshot, and say in the end what became of it."""
        try:
            if self._background.drained:  # since this call began, as the program ends
                self._background.refuse_rest()
                save.handle.result()
            whole = self._stage(flat, save)
            save.blocked_seconds = save.elapsed()
        except BaseException as error:
            save.staging_error = error
            save.to(Snapshot.BROKEN)
            raise
        if not whole:
            save.to(Snapshot.BROKEN)
        else:
            save.to(Snapshot.STAGED if save.late is None else Snapshot.QUEUED)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Let the background call something; a signal's handler may ask for it."""
        self._background.call_soon(call)

    def prewarm(self, state: Any) -> None:
        """Take (and pin) the memory that saving ``state`` will need, without saving it."""
        self._refuse_closed()
        self._fit(state)
        for arena in self._memory.arenas:
            arena.touch()

    def check(self, state: Any) -> None:
        """Raise StateError, with all its problems, if a state cannot be saved."""
        self._lay_out(state)

    def end(self, then: Callable[[], None] | None = None) -> None:
        """Let all threads end, and memory be given back, once the save in flight has ended.

        Args:
            then: called in the background after that.
        """
        self._background.end(then)

    def close(self) -> None:
        """`end`, and wait for it. Idempotent; it may be called again if it was interrupted."""
        self._background.close()

    def _refuse_closed(self) -> None:
        if self._background.over:
            raise ClosedError("it was closed (perhaps that was interrupted), or the program ends")

    def _fit(self, state: Any) -> tuple[Flat, Plan]:
        """Take a state apart, lay it out, make memory fit, and cut it into chunks.

        Raises:
            StateError: it cannot be saved.
            SaveError, ConfigError: the memory that it takes cannot be had.
        """
        flat, layout = self._lay_out(state)
        transport = self._snapshotter.transport
        pin = flat.on_device and transport is not None and transport.pinned
        try:
            groups = tuple(group.nbytes for group in layout.groups)
            self._memory.fit(groups, pin=pin, let_go=self._snapshotter.forget)
        except (OSError, MemoryError) as cause:  # how much there is could not even be looked up
            raise SaveError(f"cannot take the memory that this save needs: {cause}") from cause
        plan, chunk_bytes = self._plan, self._memory.chunk_bytes
        if plan is None or plan.layout is not layout or plan.chunk_bytes != chunk_bytes:
            plan = self._plan = Plan.cut(layout, chunk_bytes)
        return flat, plan

    def _lay_out(self, state: Any) -> tuple[Flat, Layout]:
        """Take a state apart, and lay it out."""
        # Taken out while they work: what was interrupted may remember half of a layout.
        layouts, self._layouts = self._layouts or Layouts(), None
        stillness, self._stillness = self._stillness or Stillness(), None
        transport = self._snapshotter.transport
        owns = None if transport is None else transport.owns
        flat = flatten(state, owns, overlap=self._overlap)
        if self._reuse != "off":
            flat.frozen = stillness.note(flat)
        layout = layouts.of(flat)
        self._layouts, self._stillness = layouts, stillness
        return flat, layout

    def _stage(self, flat: Flat, save: Save) -> bool:
        """Copy all chunks into slots, in waves if there are fewer slots than chunks.

        Returns whether all were copied; if not, the save has failed meanwhile.
        """
        slots = self._memory.slots
        assert slots is not None
        ready: list[Staged] = []
        unfinished = []
        chunks = [chunk for chunk in save.plan.chunks if chunk.index not in save.reused]
        for chunk in sorted(chunks, key=lambda chunk: (chunk.late, chunk.index)):
            slot = slots.acquire(chunk.index, wait=False)
            if slot is None:
                # Only now: as long as slots are free, the copy has the cores and the GIL to itself.
                save.staged.extend(ready)
                self._background.wake(save)
                ready = []
                slot = slots.acquire(chunk.index, give_up=save.has_failed)
                if slot is None:
                    return False
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
        save.staged.extend(ready)
        return True
