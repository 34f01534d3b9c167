"""Pipeline: one save, from live state to committed checkpoint.

    training thread          encoders                event loop thread         io threads
    flatten, plan, stage ──▶ digest, planes, zstd ──▶ append, in plan order ──▶ write(2), fsync
          ▲                        ▲                                            commit
          └── slots ───────────────┴── frames: whoever wants one waits for it ──┘

What bounds it: a chunk is somewhere only if it has a slot or a frame, and there are as many of both
as the budget allows. Queues between the stages are no longer than that. One save is at work at a
time.

Failure: the first error ends a save. `Save.failed` stops the stager and the encoders; once both
are still, every slot and frame the save had is returned and its draft is removed. So the next save
finds the pipeline as if the failed one had never been.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import platform
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._version import __version__
from .codec.choose import LEAST_WRITES, TRY, TRY_BYTES, Chooser, Compression
from .codec.frame import coding_for
from .errors import AsyncSaveError, CommitError, SaveError, StagingError
from .handle import SaveHandle, closed, finish_at_exit
from .memory import Memory, MemoryLimit, encoder_threads
from .report import SaveReport
from .snapshot.arena import Slot
from .snapshot.fence import FENCE, CudaTransport, LateCopies, Transport
from .snapshot.snapshotter import Snapshotter, Staged
from .state.plan import Plan, Planner
from .state.tree import Flat, flatten
from .storage.commit import Draft, begin, commit, discard
from .storage.filesystem import FileSystem
from .storage.manifest import ChunkRecord, digest, encode_manifests, tensor_records
from .storage.writer import DataWriter
from .task import Frame, Save, Target
from .watchdog import STALL_WARNING_SECONDS, Watchdog
from .workers import Workers

_log = logging.getLogger("asyncsave")
_T = TypeVar("_T")
_FIRST_AHEAD = 2
_IO_THREADS = 2  # one writes; the other waits for device events, or for the stager


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
        memory_limit: MemoryLimit,
        overlap: bool,
        durable: bool,
        stall_warning_seconds: float | None = STALL_WARNING_SECONDS,
        once: bool = False,
        transport: Transport | None = None,
    ) -> None:
        if transport is None and torch.cuda.is_available():
            transport = CudaTransport()
        self._filesystem = filesystem
        self._compression = compression
        self._byte_planes = compression is None or compression.byte_planes
        self._memory = Memory(memory_limit, compression)
        self._durable = durable
        self._stall_warning_seconds = stall_warning_seconds
        self._once = once
        self._planner = Planner()
        self._snapshotter = Snapshotter(transport, overlap=overlap)
        self._chooser = Chooser(compression, encoder_threads())
        self._current: SaveHandle | None = None
        self._closed = False
        self._encode = Workers("asyncsave-encode", encoder_threads())
        self._io = Workers("asyncsave-io", _IO_THREADS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="asyncsave-loop", daemon=True)
        self._thread.start()
        finish_at_exit(self)

    # -- training thread ----------------------------------------------------------------------

    @property
    def current(self) -> SaveHandle | None:
        """The save that was begun last."""
        return self._current

    @property
    def in_callback(self) -> bool:
        """Whether the caller is the event loop's thread: a done callback, which must not wait."""
        return threading.current_thread() is self._thread

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
        self._chooser.begin_save()
        self._current = handle
        asyncio.run_coroutine_threadsafe(self._run(save), self._loop)
        try:
            self._stage(flat, save)
        except BaseException as error:
            save.staging_error = error
            self._fail(save)
            raise
        finally:
            save.blocked_seconds = save.elapsed()
            self._feed(save, [None])
            save.staging_over.set()
        return handle

    def prewarm(self, state: Any) -> None:
        """Take (and pin) the memory that saving ``state`` will need, without saving it."""
        self._fit(flatten(state))
        for arena in self._memory.arenas:
            arena.touch()

    def close(self) -> None:
        """Finish the save in flight, end all threads, give all memory back. Idempotent."""
        if self._current is not None:
            self._current.wait_ended()
            if self._once:
                self._thread.join()  # it closes the rest by itself
                return
        if self._closed:
            return
        with contextlib.suppress(RuntimeError):  # closed by a close() that was interrupted
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._close_rest()
        closed(self)

    def _close_rest(self) -> None:
        self._closed = True
        self._encode.shutdown()
        self._io.shutdown()
        self._memory.close()
        self._snapshotter.forget()

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
                self._feed(save, ready)
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
            self._note_staged(save)
        self._feed(save, ready)

    def _feed(self, save: Save, items: list[Staged | None]) -> None:
        def put() -> None:
            for item in items:
                save.queue.put_nowait(item)

        self._loop.call_soon_threadsafe(put)

    # -- event loop thread --------------------------------------------------------------------

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _run(self, save: Save) -> None:
        report: SaveReport | None = None
        error: BaseException | None = None
        save.watchdog.start()
        try:
            report = await self._write(save)
        except BaseException as caught:  # whatever it is, it belongs to who holds the handle
            error = save.staging_error or caught
        finally:
            save.watchdog.close()
        if error is not None and not isinstance(error, (AsyncSaveError, KeyboardInterrupt)):
            wrapped = SaveError(f"saving {save.target.path} failed: {error!r}")
            wrapped.__cause__ = error
            error = wrapped
        if self._once:
            self._close_rest()
        if report is not None:
            save.handle.set_report(report)
        else:
            assert error is not None
            save.handle.set_error(error, seen=save.staging_error is not None)
        if self._once:
            closed(self)  # last: at exit, what is open is waited for before errors are looked at
            self._loop.stop()

    async def _write(self, save: Save) -> SaveReport:
        """Take a save from its first staged chunk to its commit, or undo it."""
        draft, watchdog = None, save.watchdog
        writer: DataWriter | None = None
        encoding: asyncio.Task[None] | None = None
        futures: asyncio.Queue[asyncio.Future[Frame] | None] = asyncio.Queue()
        # How many chunks may be on their way to the disk. Where the coding depends on what the ones
        # before them took they are few, as many as there are frames; and two until so many are
        # written that something is known.
        few = self._memory.frames.count if self._chooser.waits and self._memory.frames else 0
        ahead = asyncio.Semaphore(_FIRST_AHEAD if few else len(save.plan.chunks))
        try:
            watchdog.writing("creating files")
            draft = await self._call(begin, self._filesystem, save.target.path)
            writer = await DataWriter.create(self._filesystem, draft.data_path, self._io)
            encoding = asyncio.create_task(self._encode_all(save, futures, ahead))
            encoding.add_done_callback(lambda _: futures.put_nowait(None))
            watchdog.writing("")
            while (future := await futures.get()) is not None:
                watchdog.writing("encoding")
                frame = await future
                watchdog.writing(f"writing at offset {writer.nbytes}")
                await self._append(save, frame, writer)
                watchdog.writing("")
                ahead.release()
                if len(save.chunks) == LEAST_WRITES:
                    for _ in range(_FIRST_AHEAD, few):
                        ahead.release()
            await encoding
            if self._durable:
                watchdog.writing("syncing the data file")
                before = writer.write_seconds
                await writer.sync()
                self._chooser.synced(writer.nbytes, writer.write_seconds - before)
            watchdog.writing("closing the data file")
            await writer.close()
            watchdog.writing("syncing and committing")
            stored = await self._call(self._commit, save, draft, writer.nbytes)
        except BaseException as error:
            watchdog.writing("cleaning up after it failed")
            self._fail(save)
            if encoding is not None:
                for _ in save.plan.chunks:
                    ahead.release()  # it goes on to the end of its queue
                await asyncio.wait([encoding])
                encoding.exception()  # follows from the first error, which is reported
            await self._settle(save, futures)
            if writer is not None:
                with contextlib.suppress(AsyncSaveError):
                    await writer.close()
            if draft is not None and not isinstance(error, CommitError):  # else it is in place
                await self._call(discard, self._filesystem, draft)
            raise
        report = await self._call(save.report, stored, self._memory.nbytes)
        watchdog.writing("removing older checkpoints")
        try:
            await self._call(save.target.then)
        except Exception:
            _log.exception("%s is durable, but tidying up after it failed", save.target.path)
        return report

    async def _encode_all(
        self,
        save: Save,
        futures: asyncio.Queue[asyncio.Future[Frame] | None],
        ahead: asyncio.Semaphore,
    ) -> None:
        """Hand staged chunks to the encoders as they come, and their results on in that order."""
        save.watchdog.feeding("copying the state in the thread that saves")
        while (staged := await save.queue.get()) is not None:
            if staged.event is not None:
                save.watchdog.feeding("copying from the device")
                await self._call(staged.event.synchronize)
                if staged.late is not None:
                    staged.late.settle(staged.chunk.index)
            await ahead.acquire()
            room, level = None, self._chooser.pick()
            if level:
                # In the order of the chunks, which is the order they are written in: otherwise
                # later chunks could take all frames, and the one that is waited for find none.
                save.watchdog.feeding("waiting for memory to encode into")
                room = await self._call(self._frame_for, save)
                if room is None:
                    continue  # the save has failed; go on to the end of the queue
            future = self._loop.run_in_executor(
                self._encode, self._encode_one, save, staged, room, level == TRY
            )
            futures.put_nowait(future)
            save.watchdog.feeding("copying the state in the thread that saves")
        if save.staging_error is not None:
            raise save.staging_error
        if save.failed.is_set():
            raise SaveError("another part of the save has failed")
        if save.late is not None:
            self._note_staged(save)

    def _frame_for(self, save: Save) -> Slot | None:
        frames = self._memory.frames
        assert frames is not None
        return save.hold(frames, frames.acquire(give_up=save.failed.is_set))

    async def _append(self, save: Save, frame: Frame, writer: DataWriter) -> None:
        begun, pages = writer.write_seconds, frame.pages()
        offset = await writer.append(pages)
        save.release(frame.arena, frame.slot)
        self._chooser.wrote(pages.nbytes, writer.write_seconds - begun)
        save.chunks[frame.chunk.index] = ChunkRecord(
            offset=offset,
            length=frame.length,
            raw_length=frame.chunk.nbytes,
            coding=frame.coding,
            parts=list(frame.parts),
            xxh3_128=frame.digest,
            raw_xxh3_128=frame.raw_digest,
        )

    def _fail(self, save: Save) -> None:
        """Stop whoever works for this save."""
        save.failed.set()
        for arena in self._memory.arenas:
            arena.wake()

    async def _settle(
        self, save: Save, futures: asyncio.Queue[asyncio.Future[Frame] | None]
    ) -> None:
        """Wait until nobody touches the slots of a failed save any more, and return them."""
        await self._call(save.staging_over.wait)
        while not futures.empty():
            future = futures.get_nowait()
            if future is not None:
                await asyncio.wait([future])
                future.exception()  # the first error is reported; these follow from it
        if self._snapshotter.transport is not None:
            with contextlib.suppress(RuntimeError):
                await self._call(self._snapshotter.transport.drain)
        if save.late is not None:
            save.late.drop()
        save.release_all()

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        return await self._loop.run_in_executor(self._io, function, *args)

    def _note_staged(self, save: Save) -> None:
        save.staged_seconds = save.elapsed()
        save.handle.set_staged()

    def _commit(self, save: Save, draft: Draft, data_bytes: int) -> int:
        """Write the manifests and commit; return the length of all files."""
        target = save.target
        rank_bytes, checkpoint_bytes = encode_manifests(
            tree=save.tree,
            tensors=tensor_records(save.names, save.plan),
            chunks=[save.chunks[chunk.index] for chunk in save.plan.chunks],
            data_bytes=data_bytes,
            step=target.step,
            metrics=target.metrics,
            metadata=target.metadata,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            versions={
                "asyncsave": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        )
        commit(
            self._filesystem,
            draft,
            rank_bytes,
            checkpoint_bytes,
            durable=self._durable,
            replace=save.target.replace,
        )
        return data_bytes + len(rank_bytes) + len(checkpoint_bytes)

    # -- encoder threads ----------------------------------------------------------------------

    def _encode_one(self, save: Save, staged: Staged, room: Slot | None, only_try: bool) -> Frame:
        """Make the frame of one chunk: encoded into ``room``, or as it is, in its slot.

        Args:
            only_try: encode a piece into ``room``, for the chooser, and leave the chunk as it is.
        """
        chunk, slot = staged.chunk, staged.slot
        slots, frames = self._memory.slots, self._memory.frames
        assert slots is not None
        raw = slot.array[: chunk.nbytes]
        raw_digest = digest(raw.data)
        if room is not None:
            assert frames is not None
            coding = coding_for(chunk.dtype, self._byte_planes)
            part = raw[:TRY_BYTES] if only_try else raw
            begun = time.perf_counter()
            encoder = self._memory.encoders.get()
            try:
                coding, parts = encoder.encode(part, coding, room.array)
            finally:
                self._memory.encoders.put(encoder)
            length = sum(parts)
            self._chooser.encoded(part.size, length, time.perf_counter() - begun)
            if coding != "raw" and not only_try:
                save.release(slots, slot)
                return Frame(
                    chunk,
                    frames,
                    room,
                    length,
                    coding,
                    parts,
                    digest(room.array[:length].data),
                    raw_digest,
                )
            save.release(frames, room)
        return Frame(chunk, slots, slot, raw.size, "raw", (raw.size,), raw_digest, raw_digest)
