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
import dataclasses
import datetime
import logging
import platform
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor

import msgspec
import torch

from .._version import __version__
from ..codec.compression import Compression
from ..errors import CommitError, LoadError, SaveError
from ..format.files import linked_file
from ..format.records import About, ChunkRecord, FileRecord, encode_manifests
from ..pages import padded
from ..report import SaveReport
from ..snapshot.snapshotter import Snapshotter
from ..state.layout import tensor_records
from ..storage.draft import Draft
from ..storage.place import Identity
from .budget import Memory, encoder_threads
from .choose import LEAST_WRITES, Chooser
from .encode import Encoding, Frame, Frames
from .handle import log_exception
from .reuse import Base, Last, Reuse, are_sound, by_file, read_frame
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
                memory = self._memory.nbytes + save.target.notes.nbytes
                report = await call(self._io, save.report, stored_bytes, memory)
                with contextlib.suppress(Exception):  # of a user's filter or handler
                    _log.info("%s", report)
                return report
            finally:
                await self._tidy_up(save)
                save.to(State.DONE)
        finally:
            save.target.notes.files.clear()  # who began the save keeps its target
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
            self._last.forget()  # whether it is the last one, nobody knows
            raise  # it is in place
        except BaseException:
            save.stop(self._memory.arenas)  # where not even the draft could be begun
            await self._settle(save)
            save.to(State.FAILED)
            raise

    async def _fill(self, save: Save, draft: Draft) -> int:
        """Write, seal and publish the draft; return the length of its own files."""
        save.to(State.WRITING)
        await self._begin_reuse(save, draft)
        async with self._fed(save) as frames:
            async for some in frames:
                await self._append(save, draft, some)
                frames.finished(len(some))
                if len(save.chunks) + len(save.reused) >= LEAST_WRITES:
                    self._encoding.disk_is_known(frames)
        own = await self._take_over(save, draft)
        save.to(State.SEALING)
        files = await draft.end_data()
        numbers = {files[i].name: i for i in range(own, len(files))}
        for index, each in save.reused.items():
            number = numbers[linked_file(0, save.reuse.linked[each.file])]
            save.chunks[index] = msgspec.structs.replace(each, file=number)
        rank_manifest, record = await call(self._io, self._manifests, save, files)
        notes = save.target.notes
        await draft.seal(rank_manifest, notes.files)
        if not save.reused:  # a sync of next to nothing says nothing of the disk
            self._chooser.synced(draft.nbytes, draft.sync_seconds)
        identities = await self._identities(draft, files)
        save.to(State.PUBLISHING)
        await draft.publish(record, replace=save.target.replace)
        save.to(State.DURABLE)
        if identities:
            last = self._last
            last.base = Base.of(save.target.place, files, identities, save.chunks.values())
            last.plan, last.versions, last.chunks = save.plan, save.versions, save.chunks
        return draft.nbytes + len(rank_manifest) + len(record) + notes.nbytes

    # -- what an earlier checkpoint has -----------------------------------------------------------

    async def _begin_reuse(self, save: Save, draft: Draft) -> None:
        """Give the files that a save may share with an earlier checkpoint names in this one.

        Raises:
            SaveError: chunks were not copied since they are there, and they are not any more.
        """
        last = self._last
        if self._on_disk.reuse == "off":
            return
        if last.base is None:
            try:
                last.base = await call(self._io, save.target.earlier)
            except LoadError as error:  # it was restored from another one, or from none
                _log.debug("nothing is shared with an earlier checkpoint: %s", error)
        if (base := last.base) is None:
            return
        files = [
            (base.place / record.name, record, identity)
            for record, identity in zip(base.files, base.identities, strict=True)
        ]
        save.watchdog.writing("linking files of the last checkpoint")
        save.reuse = Reuse(base, await draft.link(files))
        if lost := by_file(save.reused.values()).keys() - save.reuse.linked.keys():
            last.forget()
            raise SaveError(
                f"{files[min(lost)][0]} has gone, or was changed, while what is in it was not "
                "copied, as reuse='versions' allows; the next save copies and writes everything"
            )

    async def _take_over(self, save: Save, draft: Draft) -> int:
        """Keep the files that most of is needed; copy what is needed of others.

        Returns how many own files there are then.
        """
        needed = by_file(save.reused.values())
        kept = save.reuse.kept(needed)
        for number, records in needed.items():
            if number not in kept and not await self._copy(save, draft, number, records):
                kept.add(number)
        await draft.keep([save.reuse.linked[number] for number in kept])
        return draft.own_files

    async def _copy(
        self, save: Save, draft: Draft, number: int, records: Sequence[ChunkRecord]
    ) -> bool:
        """Copy chunks of an earlier checkpoint, as they are stored.

        Returns:
            False: nothing was copied, as something is damaged there; what has to be told from it
            is better told by who reads it than by a copy that looks sound.
        """
        arena = self._memory.slots
        assert arena is not None
        try:
            file = await call(self._io, draft.linked(save.reuse.linked[number]).open)
        except LoadError as error:  # no descriptor is left, say
            _log.debug("what has not changed is linked, not copied: %s", error)
            return False
        slot = arena.acquire(wait=False)
        assert slot is not None, "all are free: all chunks are written"
        try:
            save.watchdog.writing(f"copying what has not changed, at offset {draft.nbytes}")
            if not await call(self._io, are_sound, file, records, slot.array):
                _log.warning("%s is damaged, and a part of the new checkpoint with it", file.path)
                return False
            for index in [i for i, each in save.reused.items() if each.file == number]:
                record = save.reused.pop(index)
                await call(self._io, read_frame, file, record, slot.array)
                end = padded(record.length)
                slot.array[record.length : end] = 0
                where = await draft.append(arena.view(slot, end))
                save.chunks[index] = _moved(record, *where)
            return True
        finally:
            arena.release(slot)
            file.close()

    async def _identities(self, draft: Draft, files: Sequence[FileRecord]) -> list[Identity]:
        """Return what tells the files of a checkpoint; nothing if the next one need not know."""
        if self._on_disk.reuse == "off":
            return []
        try:
            return await draft.identities(files)
        except LoadError as error:  # then the next one takes nothing from it
            _log.debug("nothing will be shared with %s: %s", draft.target, error)
            return []

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
        for neighbours in _neighbours([_once(save, frame) for frame in frames]):
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


def _once(save: Save, frame: Frame) -> Frame:
    """Return a frame; if another chunk has what it would reuse, as one that is to be written."""
    if frame.reused is None:
        return frame
    where = frame.reused.file, frame.reused.offset
    if where in save.taken:
        return dataclasses.replace(frame, reused=None)
    save.taken.add(where)
    return frame


def _moved(record: ChunkRecord, file: int, offset: int) -> ChunkRecord:
    return msgspec.structs.replace(record, file=file, offset=offset)


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
