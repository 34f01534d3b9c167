"""Write: a save from its first staged chunk to its commit, or undone.

    event loop thread               encoders                  io threads
    chunks, in plan order     ──▶   digest, planes, zstd
    frames, in the same order ──▶                             write(2), fsync, commit

Failure: the first error ends a save. It is UNDOING then, which stops the stager and the encoders;
once both are still, every slot and frame is taken back and its draft is removed. So the next save
finds all as if the failed one had never been. After the commit nothing makes a save fail any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import platform
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Executor

import msgspec
import torch

from .._version import __version__
from ..codec.compression import Compression
from ..errors import CommitError, LoadError, SaveError
from ..format.records import About, ChunkRecord, FileRecord, encode_manifests
from ..pages import padded
from ..report import SaveReport
from ..snapshot.snapshotter import Snapshotter
from ..state.layout import tensor_records
from ..storage.draft import Draft
from .budget import Memory, encoder_threads
from .choose import LEAST_WRITES, Chooser
from .encode import Encoding, Frame, Frames
from .handle import log_exception
from .reuse import MOST_LINKED, NO_BASE, Base, Last, Reuse
from .save import Save, State
from .target import OnDisk
from .workers import call

_log = logging.getLogger("asyncsave")


class Writing:
    """Takes one save after the other to its commit. `write` runs in the event loop.

    Args:
        encoders: threads for digests and encoders.
        io: two threads: one writes; the other waits, for device events, memory, or the stager.
    """

    def __init__(
        self,
        memory: Memory,
        snapshotter: Snapshotter,
        *,
        compression: Compression | None,
        on_disk: OnDisk,
        last: Last,
        encoders: Executor,
        io: Executor,
    ) -> None:
        self._memory = memory
        self._snapshotter = snapshotter
        self._on_disk = on_disk
        self._last = last
        self._chooser = Chooser(compression, encoder_threads())
        self._encoding = Encoding(memory, compression, self._chooser, encoders=encoders, io=io)
        self._io = io

    async def write(self, save: Save) -> SaveReport:
        """Take a save from its first staged chunk to its commit, or undo it and raise why."""
        self._chooser.begin_save()
        save.watchdog.start()
        save.watchdog.writing(save.state.value)  # no arrow leads to the first state
        try:
            stored_bytes = await self._write(save)
            # durable: what fails from here on is told, and is no failure of the save
            try:
                report = await call(self._io, save.report, stored_bytes, self._memory.nbytes)
                with contextlib.suppress(Exception):  # of a user's filter or handler
                    _log.info("%s", report)
                return report
            finally:
                await self._tidy_up(save)
                save.to(State.DONE)
        finally:
            save.watchdog.close()

    async def _write(self, save: Save) -> int:
        """Commit a save and return the length of its files, or undo it and raise why."""
        try:
            draft = Draft(
                save.target.place,
                durable=self._on_disk.durable,
                io=self._io,
                max_file_bytes=self._on_disk.max_file_bytes,
            )
            async with draft:
                with self._stopping(save):
                    return await self._fill(save, draft)
        except CommitError:
            raise  # it is in place
        except BaseException:
            save.reuse.close()
            save.stop(self._memory.arenas)  # where not even the draft could be begun
            await self._settle(save)
            save.to(State.FAILED)
            raise

    async def _fill(self, save: Save, draft: Draft) -> int:
        """Write, seal and publish the draft; return the length of its own files."""
        save.to(State.WRITING)
        if save.reuse.base is None:
            save.reuse = await call(self._io, Reuse, await self._base_for(save))
        try:
            async with self._fed(save) as frames:
                async for some in frames:
                    await self._append(save, draft, some)
                    frames.finished(len(some))
                    if len(save.chunks) >= LEAST_WRITES:
                        self._encoding.disk_is_known(frames)
            await self._take_over(save, draft)
        finally:
            await call(self._io, save.reuse.close)
        save.to(State.SEALING)
        files = draft.records()
        rank_manifest, record = await call(self._io, self._manifests, save, files)
        await draft.seal(rank_manifest, save.target.notes.files)
        self._chooser.synced(draft.nbytes, draft.sync_seconds)
        save.to(State.PUBLISHING)
        await draft.publish(record, replace=save.target.replace)
        save.to(State.DURABLE)
        if self._on_disk.reuse != "off":
            last = self._last
            last.base = Base.of(save.target.place, files, save.chunks.values())
            last.plan, last.versions, last.chunks = save.plan, save.versions, save.chunks
        sidecars = sum(map(len, save.target.notes.files.values()))
        return draft.nbytes + len(rank_manifest) + len(record) + sidecars

    # -- what an earlier checkpoint has -----------------------------------------------------------

    async def _base_for(self, save: Save) -> Base | None:
        """Return what a save may share with an earlier checkpoint."""
        if self._on_disk.reuse == "off":
            return None
        if self._last.base is None:
            try:
                self._last.base = await call(self._io, save.target.earlier)
            except LoadError as error:  # it was restored from another one, or from none
                _log.debug("nothing is shared with an earlier checkpoint: %s", error)
        return self._last.base

    async def _take_over(self, save: Save, draft: Draft) -> None:
        """Link the files that reused chunks are in, or copy the chunks.

        Raises:
            SaveError: they are not what they were.
        """
        if not save.reused:
            return
        linked: dict[int, int] = {}
        for number, records in _by_file(save.reused.values()).items():
            if len(linked) < MOST_LINKED and save.reuse.is_worth_linking(number, records):
                found = await draft.link(*save.reuse.file(number))
                if found is not None:
                    linked[number] = found
        copied: dict[tuple[int, int], ChunkRecord] = {}
        for index, record in list(save.reused.items()):
            frame = record.file, record.offset
            if record.file not in linked:
                if frame not in copied:
                    copied[frame] = await self._copy(save, draft, record)
                save.chunks[index] = copied[frame]
                del save.reused[index]
        for index, record in save.reused.items():
            file = draft.own_files + linked[record.file]
            save.chunks[index] = msgspec.structs.replace(record, file=file)

    async def _copy(self, save: Save, draft: Draft, record: ChunkRecord) -> ChunkRecord:
        """Copy a chunk of an earlier checkpoint, as it is stored; return where it is now."""
        arena = self._memory.slots
        assert arena is not None
        slot = arena.acquire(wait=False)
        assert slot is not None, "all are free: all chunks are written"
        try:
            save.watchdog.writing(f"copying what has not changed, at offset {draft.nbytes}")
            try:
                await call(self._io, save.reuse.read, record, slot.array)
            except SaveError:
                # it is damaged: the next save takes nothing from it
                self._last.base, self._last.plan = NO_BASE, None
                raise
            end = padded(record.length)
            slot.array[record.length : end] = 0
            file, offset = await draft.append(arena.view(slot, end))
        finally:
            arena.release(slot)
        return msgspec.structs.replace(record, file=file, offset=offset)

    # -- chunks -----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _fed(self, save: Save) -> AsyncIterator[Frames]:
        """Have frames made of all that is staged; on leaving, nobody is at work on any.

        Raises:
            StagingError, SaveError: not all was staged.
        """
        frames = self._encoding.frames(save)
        feeding = asyncio.create_task(self._encoding.feed(save, frames))
        try:
            with self._stopping(save):
                yield frames
                await feeding
        except BaseException:
            frames.widen(len(save.plan.chunks) + 1)  # the feeder goes on to the end of its queue
            await asyncio.wait([feeding])
            feeding.exception()  # follows from the first error, which is reported
            await frames.drain()
            raise

    @contextlib.contextmanager
    def _stopping(self, save: Save) -> Iterator[None]:
        """On an error, let whoever works or waits for this save stop; unless it is in place."""
        try:
            yield
        except CommitError:
            save.to(State.UNKNOWN)
            raise
        except BaseException:
            save.stop(self._memory.arenas)
            raise

    async def _append(self, save: Save, draft: Draft, frames: Sequence[Frame]) -> None:
        """Write what comes of one task, neighbours in memory at once."""
        watchdog = save.watchdog
        for neighbours in _neighbours(frames):
            if (reused := neighbours[0].reused) is not None:
                neighbours[0].arena.release(neighbours[0].slot)
                save.reused[neighbours[0].chunk.index] = reused
                continue
            watchdog.writing(f"writing at offset {draft.nbytes}")
            first, last = neighbours[0], neighbours[-1]
            nbytes = (len(neighbours) - 1) * first.slot.nbytes + last.pad()
            begun = draft.write_seconds
            file, offset = await draft.append(first.arena.view(first.slot, nbytes))
            self._chooser.wrote(nbytes, draft.write_seconds - begun)
            for frame in neighbours:
                frame.arena.release(frame.slot)
                save.chunks[frame.chunk.index] = _record(frame, file, offset)
                offset += padded(frame.length)
        watchdog.writing("")

    async def _settle(self, save: Save) -> None:
        """Wait until nobody touches the slots of a failed save any more, and take them back."""
        await call(self._io, _wait_left, save)
        try:
            if self._snapshotter.transport is not None:
                await call(self._io, self._snapshotter.transport.drain)
        except RuntimeError as error:
            _log.debug("waiting for copies of a save that has failed: %s", error)
        finally:
            if save.late is not None:
                save.late.drop()
            for arena in self._memory.arenas:
                arena.reclaim()

    async def _tidy_up(self, save: Save) -> None:
        try:
            await call(self._io, save.target.then)
        except Exception:
            log_exception("%s is durable, but tidying up after it failed", save.target.place)

    def _manifests(self, save: Save, files: list[FileRecord]) -> tuple[bytes, bytes]:
        """Return the rank manifest and ``checkpoint.json``."""
        target = save.target
        return encode_manifests(
            tree=save.tree,
            tensors=tensor_records(save.names, save.plan.layout),
            chunks=[save.chunks[chunk.index] for chunk in save.plan.chunks],
            files=files,
            about=About(
                step=target.step,
                lineage=target.lineage,
                metrics=dict(target.notes.metrics),
                metadata=target.notes.metadata,
                files=target.notes.files,
                time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                versions={
                    "asyncsave": __version__,
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
            ),
        )


def _by_file(records: Iterable[ChunkRecord]) -> dict[int, list[ChunkRecord]]:
    """Return records by the number of the file that they are in."""
    found: dict[int, list[ChunkRecord]] = {}
    for record in records:
        found.setdefault(record.file, []).append(record)
    return found


def _record(frame: Frame, file: int, offset: int) -> ChunkRecord:
    return ChunkRecord(
        file=file,
        offset=offset,
        length=frame.length,
        raw_length=frame.chunk.nbytes,
        coding=frame.coding,
        parts=list(frame.parts),
        xxh3_128=frame.digest,
        raw_xxh3_128=frame.raw_digest,
    )


def _neighbours(frames: Sequence[Frame]) -> Iterator[Sequence[Frame]]:
    """Yield the frames in runs that lie end to end in memory."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or not frames[i].follows(frames[i - 1]):
            yield frames[start:i]
            start = i


def _wait_left(save: Save) -> None:
    """Wait until the thread that saves has left."""
    with save.staging:
        pass
