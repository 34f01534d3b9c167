"""Stages: what happens to a save once its chunks are staged, up to its commit.

    event loop thread               encoders                  io threads
    chunks, in plan order     ──▶   digest, planes, zstd
    frames, in the same order ──▶                             write(2), fsync, commit

While the training runs Python, each thread waits up to 5 ms (the interpreter's switch interval) to
get the GIL back after every call that let go of it, and makes the training wait for as long as it
takes two threads to wake. So what is stored as it is goes in groups of neighbours: one task digests
them, one write takes them to the disk. For 16 MiB that is 4 hand-overs of the GIL, and not 10.

Failure: the first error ends a save. `Save.failed` stops the stager and the encoders; once both
are still, every slot and frame is taken back and its draft is removed. So the next save finds all
as if the failed one had never been. After the commit nothing makes a save fail any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import torch

from .._version import __version__
from ..codec.compression import Compression
from ..codec.frame import coding_for
from ..errors import AsyncSaveError, CommitError, SaveError
from ..format.manifest import ChunkRecord, digest, encode_manifests
from ..report import SaveReport
from ..snapshot.arena import Slot
from ..snapshot.snapshotter import Snapshotter, Staged
from ..state.plan import tensor_records
from ..storage.commit import Draft, begin, commit, discard
from ..storage.filesystem import FileSystem
from ..storage.writer import DataWriter, padded
from .budget import Memory, encoder_threads
from .choose import LEAST_WRITES, TRY, TRY_BYTES, Chooser
from .save import Frame, Save

_log = logging.getLogger("asyncsave")
_T = TypeVar("_T")
_Frames = asyncio.Future[Sequence[Frame]]
# Chunks in a group. Measured: beside a loop of pure Python, 1.02 GB took 0.94 s and cost the loop
# 0.05 s; one by one, it was 1.57 s and 0.15 s.
_TOGETHER = 4
_LOOK_SECONDS = 1.0  # how often to look whether the stager has left, should nobody have said so


class Stages:
    """Takes one save after the other to its commit. `write` runs in the event loop.

    Args:
        encode: threads for digests and encoders.
        io: two threads: one writes; the other waits, for device events, memory, or the stager.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        memory: Memory,
        snapshotter: Snapshotter,
        *,
        compression: Compression | None,
        durable: bool,
        encode: Executor,
        io: Executor,
    ) -> None:
        self._filesystem = filesystem
        self._memory = memory
        self._snapshotter = snapshotter
        self._byte_planes = compression is None or compression.byte_planes
        self._durable = durable
        self._chooser = Chooser(compression, encoder_threads())
        self._encode = encode
        self._io = io

    async def write(self, save: Save) -> SaveReport:
        """Take a save from its first staged chunk to its commit, or undo it and raise why."""
        self._chooser.begin_save()
        save.watchdog.start()
        try:
            stored = await self._write(save)
            # committed: what fails from here on is told, and is no failure of the save
            try:
                report = await self._call(save.report, stored, self._memory.nbytes)
                _log.info("%s", report)
                return report
            finally:
                save.watchdog.writing("removing older checkpoints")
                await self._tidy_up(save)
        finally:
            save.watchdog.close()

    async def _tidy_up(self, save: Save) -> None:
        try:
            await self._call(save.target.then)
        except Exception:
            _log.exception("%s is durable, but tidying up after it failed", save.target.path)

    async def _write(self, save: Save) -> int:
        """Commit a save and return the length of its files, or undo it and raise why."""
        draft, watchdog = None, save.watchdog
        writer: DataWriter | None = None
        encoding: asyncio.Task[None] | None = None
        futures: asyncio.Queue[_Frames | None] = asyncio.Queue()
        # How many chunks may be on their way to the disk: where all are encoded, as many as there
        # are frames; where that depends on what earlier ones took, two groups, and two chunks until
        # something is known.
        first = most = len(save.plan.chunks)
        if self._chooser.waits:
            first, most = LEAST_WRITES, 2 * _TOGETHER
        elif self._memory.frames is not None:
            first = most = self._memory.frames.count
        ahead, later = asyncio.Semaphore(first), most - first
        try:
            watchdog.writing("creating files")
            draft = await self._call(begin, self._filesystem, save.target.path)
            writer = await DataWriter.create(self._filesystem, draft.data_path, self._io)
            encoding = asyncio.create_task(self._encode_all(save, futures, ahead))
            encoding.add_done_callback(lambda _: futures.put_nowait(None))
            watchdog.writing("")
            while (future := await futures.get()) is not None:
                watchdog.writing("encoding")
                for neighbours in _runs(await future):
                    watchdog.writing(f"writing at offset {writer.nbytes}")
                    await self._append(save, neighbours, writer)
                    _release(ahead, len(neighbours))
                watchdog.writing("")
                if later and len(save.chunks) >= LEAST_WRITES:
                    _release(ahead, later)
                    later = 0
            await encoding
            if self._durable:
                watchdog.writing("syncing the data file")
                before = writer.write_seconds
                await writer.sync()
                self._chooser.synced(writer.nbytes, writer.write_seconds - before)
            watchdog.writing("closing the data file")
            await writer.close()
            watchdog.writing("syncing and committing")
            return await self._call(self._commit, save, draft, writer.nbytes)
        except BaseException as error:
            watchdog.writing("cleaning up after it failed")
            save.fail(self._memory.arenas)
            if encoding is not None:
                _release(ahead, len(save.plan.chunks))  # it goes on to the end of its queue
                await asyncio.wait([encoding])
                encoding.exception()  # follows from the first error, which is reported
            await self._settle(save, futures)
            if writer is not None:
                with contextlib.suppress(AsyncSaveError):
                    await writer.close()
            if draft is not None and not isinstance(error, CommitError):  # else it is in place
                await self._call(discard, self._filesystem, draft)
            raise

    async def _encode_all(
        self, save: Save, futures: asyncio.Queue[_Frames | None], ahead: asyncio.Semaphore
    ) -> None:
        """Hand staged chunks to the encoders as they come, and their results on in that order."""
        loop = asyncio.get_running_loop()
        raw: list[Staged] = []

        def digest_raw() -> None:
            if raw:
                task = loop.run_in_executor(self._encode, self._digest_all, raw.copy())
                futures.put_nowait(task)
                raw.clear()

        save.watchdog.feeding("copying the state in the thread that saves")
        while True:
            if len(raw) == _TOGETHER or not save.staged:
                digest_raw()
            staged = await self._next(save)
            if staged is None:
                digest_raw()
                break
            if staged.event is not None:
                if not staged.event.query():
                    digest_raw()
                    save.watchdog.feeding("copying from the device")
                    await self._call(staged.event.synchronize)
                if staged.late is not None:
                    staged.late.settle(staged.chunk.index)
            if ahead.locked():
                digest_raw()
                save.watchdog.feeding("waiting for the chunks before it")
            await ahead.acquire()
            level = self._chooser.pick()
            if level:
                digest_raw()
                # In the order of the chunks, which is the order they are written in: otherwise
                # later chunks could take all frames, and the one that is waited for find none.
                save.watchdog.feeding("waiting for memory to encode into")
                room = self._frame_for(save, wait=False) or await self._call(self._frame_for, save)
                if room is None:
                    continue  # the save has failed; go on to the end of the queue
                task = loop.run_in_executor(
                    self._encode, self._encode_one, save, staged, room, level == TRY
                )
                futures.put_nowait(task)
            else:
                raw.append(staged)
            save.watchdog.feeding("copying the state in the thread that saves")
        if not save.complete:
            raise _left_early(save)
        if save.failed:
            raise SaveError("another part of the save has failed")
        if save.late is not None:
            save.note_staged()

    async def _next(self, save: Save) -> Staged | None:
        """Wait for the next staged chunk; None once the thread that saves has left."""
        loop = asyncio.get_running_loop()
        while True:
            save.wake.clear()
            left = not save.staging.locked()
            if save.staged:  # looked at after the lock: what it staged last is there by then
                return save.staged.popleft()
            if left:
                return None
            # whoever was interrupted may not have come to say so
            timer = loop.call_later(_LOOK_SECONDS, save.wake.set)
            await save.wake.wait()
            timer.cancel()

    def _frame_for(self, save: Save, *, wait: bool = True) -> Slot | None:
        frames = self._memory.frames
        assert frames is not None
        return frames.acquire(wait=wait, give_up=save.has_failed)

    async def _append(self, save: Save, frames: Sequence[Frame], writer: DataWriter) -> None:
        """Write frames that are neighbours in memory, and note where they are."""
        first, last = frames[0], frames[-1]
        nbytes = (len(frames) - 1) * first.slot.nbytes + last.pad()
        begun = writer.write_seconds
        offset = await writer.append(first.arena.view(first.slot, nbytes))
        self._chooser.wrote(nbytes, writer.write_seconds - begun)
        for frame in frames:
            frame.arena.release(frame.slot)
            save.chunks[frame.chunk.index] = ChunkRecord(
                offset=offset,
                length=frame.length,
                raw_length=frame.chunk.nbytes,
                coding=frame.coding,
                parts=list(frame.parts),
                xxh3_128=frame.digest,
                raw_xxh3_128=frame.raw_digest,
            )
            offset += padded(frame.length)

    async def _settle(self, save: Save, futures: asyncio.Queue[_Frames | None]) -> None:
        """Wait until nobody touches the slots of a failed save any more, and return them."""
        await self._call(_wait_left, save)
        while not futures.empty():
            future = futures.get_nowait()
            if future is not None:
                await asyncio.wait([future])
                future.exception()  # the first error is reported; these follow from it
        try:
            if self._snapshotter.transport is not None:
                await self._call(self._snapshotter.transport.drain)
        except RuntimeError as error:
            _log.debug("waiting for copies of a save that has failed: %s", error)
        finally:
            if save.late is not None:
                save.late.drop()
            for arena in self._memory.arenas:
                arena.reclaim()

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)

    def _commit(self, save: Save, draft: Draft, data_bytes: int) -> int:
        """Write the manifests and commit; return the length of all files."""
        target = save.target
        rank_bytes, checkpoint_bytes = encode_manifests(
            tree=save.tree,
            tensors=tensor_records(save.names, save.plan),
            chunks=[save.chunks[chunk.index] for chunk in save.plan.chunks],
            data_bytes=data_bytes,
            step=target.step,
            lineage=target.lineage,
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

    def _digest_all(self, group: Sequence[Staged]) -> Sequence[Frame]:
        """Make the frames of chunks that are stored as they are."""
        return [self._raw_frame(each) for each in group]

    def _raw_frame(self, staged: Staged, known_digest: str = "") -> Frame:
        chunk, slot, arena = staged.chunk, staged.slot, self._memory.slots
        assert arena is not None
        found = known_digest or digest(slot.array[: chunk.nbytes].data)
        return Frame(chunk, arena, slot, chunk.nbytes, "raw", (chunk.nbytes,), found, found)

    def _encode_one(
        self, save: Save, staged: Staged, room: Slot, only_try: bool
    ) -> Sequence[Frame]:
        """Make the frame of one chunk, encoded into ``room``; or as it is, where that is shorter.

        Args:
            only_try: encode a piece into ``room``, for the chooser, and leave the chunk as it is.
        """
        chunk, slots, frames = staged.chunk, self._memory.slots, self._memory.frames
        assert slots is not None
        assert frames is not None
        raw = staged.slot.array[: chunk.nbytes]
        raw_digest = digest(raw.data)
        part = raw[:TRY_BYTES] if only_try else raw
        begun = time.perf_counter()
        encoder = self._memory.encoders.get()
        try:
            coding = coding_for(chunk.dtype, self._byte_planes)
            coding, parts = encoder.encode(part, coding, room.array)
        finally:
            self._memory.encoders.put(encoder)
        length = sum(parts)
        self._chooser.encoded(part.size, length, time.perf_counter() - begun)
        if coding == "raw" or only_try:
            frames.release(room)
            return [self._raw_frame(staged, raw_digest)]
        slots.release(staged.slot)
        found = digest(room.array[:length].data)
        return [Frame(chunk, frames, room, length, coding, parts, found, raw_digest)]


def _wait_left(save: Save) -> None:
    """Wait until the thread that saves has left."""
    with save.staging:
        pass


def _left_early(save: Save) -> BaseException:
    """Return why a save must fail whose snapshot is not complete."""
    cause = save.staging_error
    if isinstance(cause, Exception):
        return cause
    error = SaveError(f"saving {save.target.path} was interrupted while the state was copied")
    error.__cause__ = cause
    return error


def _runs(frames: Sequence[Frame]) -> Iterator[Sequence[Frame]]:
    """Yield the frames in runs that lie end to end in memory."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or not frames[i].follows(frames[i - 1]):
            yield frames[start:i]
            start = i


def _release(semaphore: asyncio.Semaphore, count: int) -> None:
    for _ in range(count):
        semaphore.release()
