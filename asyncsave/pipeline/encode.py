"""Encode: staged chunks become stored chunks, in the order in which they were staged.

While the training runs Python, each thread waits up to 5 ms (the interpreter's switch interval) to
get the GIL back after every call that let go of it, and makes the training wait for as long as it
takes two threads to wake. So what is stored as it is goes in groups of neighbours: one task digests
them, one write takes them to the disk. For 16 MiB that is 4 hand-overs of the GIL, and not 10.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ..codec.compression import Compression
from ..codec.frame import coding_for
from ..errors import SaveError
from ..format.records import ChunkRecord, digest
from ..pages import padded
from ..snapshot.arena import Arena, Slot
from ..snapshot.snapshotter import Staged
from ..state.chunks import Chunk
from .budget import Memory
from .choose import LEAST_WRITES, PROBE_BYTES, Chooser, Pick
from .ordered import Ordered
from .save import Save, Snapshot
from .workers import call

# Chunks in a group. Measured beside a loop of pure Python (bench/knobs.py group): a save takes 1.44
# s, one by one 2.03, in pairs 1.63, and in eights and sixteens 1.51 and 1.53.
GROUP_CHUNKS = 4
_LOOK_SECONDS = 1.0  # how often to look whether the stager has left, should nobody have said so


@dataclass(frozen=True, slots=True)
class Frame:
    """A stored chunk on its way: the first ``length`` bytes of ``slot``, which is of ``arena``.

    One that is ``reused`` need not go there: it is the chunk of this record, of an earlier
    checkpoint.
    """

    chunk: Chunk
    arena: Arena
    slot: Slot
    length: int
    coding: str
    parts: tuple[int, ...]
    digest: str
    raw_digest: str
    reused: ChunkRecord | None = None

    def pad(self) -> int:
        """Fill its last page up with zeros; return how long all its pages are."""
        end = padded(self.length)
        self.slot.array[self.length : end] = 0
        return end

    def follows(self, other: Frame) -> bool:
        """Whether its bytes in memory follow right behind those of another one."""
        return (
            self.reused is None
            and other.reused is None
            and self.arena is other.arena
            and self.slot.index == other.slot.index + 1
            and other.length == other.slot.nbytes
        )


Frames = Ordered[Sequence[Frame]]


class Encoding:
    """Makes frames. `digest_group`, `encode` and `probe` run in the encoders' threads, `frame_slot`
    in an io thread where it waits, all else in the event loop.

    Args:
        chooser: says what is done with each chunk.
        encoders: threads for digests and encoders.
        io: two threads, one of which is free to wait in.
    """

    def __init__(
        self,
        memory: Memory,
        compression: Compression | None,
        chooser: Chooser,
        *,
        encoders: Executor,
        io: Executor,
    ) -> None:
        self._memory = memory
        self._byte_planes = compression is None or compression.byte_planes
        self.chooser = chooser
        self.encoders = encoders
        self.io = io

    def frames(self, save: Save) -> Frames:
        """Return what the frames of a save go through.

        Where all is encoded, there are as many on their way as there are buffers for them; where
        that depends on what earlier ones took, two until the disk is known.
        """
        if self.chooser.adapts:
            return Ordered(LEAST_WRITES)
        if self._memory.frames is not None:
            return Ordered(self._memory.frames.count)
        return Ordered(len(save.plan.chunks))

    def disk_is_known(self, frames: Frames) -> None:
        """Let more be on their way: enough was written for the chooser."""
        if self.chooser.adapts:
            frames.widen(2 * GROUP_CHUNKS)

    async def feed(self, save: Save, frames: Frames) -> None:
        """Make all frames of a save, in the order of its chunks; it ends where that is read.

        Raises:
            StagingError: the snapshot is torn, or could not be taken.
            SaveError: that was interrupted.
        """
        try:
            await _Feed(self, save, frames).run()
        finally:
            frames.end()

    def frame_slot(self, save: Save, *, wait: bool = True) -> Slot | None:
        """Return where a chunk can be encoded to; None if there is no such place now."""
        frames = self._memory.frames
        assert frames is not None
        return frames.acquire(wait=wait, give_up=save.has_failed)

    # -- encoder threads ------------------------------------------------------------------------

    def digest_group(self, save: Save, group: Sequence[Staged]) -> Sequence[Frame]:
        """Make the frames of chunks that are stored as they are."""
        return [self._raw_frame(save, each) for each in group]

    def encode(self, save: Save, staged: Staged, into: Slot) -> Sequence[Frame]:
        """Make the frame of one chunk, encoded; or as it is, where that is shorter."""
        chunk = staged.chunk
        raw_digest = digest(staged.slot.array[: chunk.nbytes].data)
        coding, parts = "raw", tuple[int, ...]()
        if save.reuse.find(raw_digest, chunk.nbytes) is None:
            coding, parts = self._encode(staged, chunk.nbytes, into)
        assert self._memory.frames is not None
        assert self._memory.slots is not None
        if coding == "raw":
            self._memory.frames.release(into)
            return [self._raw_frame(save, staged, raw_digest)]
        self._memory.slots.release(staged.slot)
        length = sum(parts)
        found = digest(into.array[:length].data)
        frames = self._memory.frames
        return [Frame(chunk, frames, into, length, coding, parts, found, raw_digest)]

    def probe(self, save: Save, staged: Staged, into: Slot) -> Sequence[Frame]:
        """Make the frame of a chunk as it is; encode a piece of it, for the chooser."""
        frame = self._raw_frame(save, staged)
        if frame.reused is None:
            self._encode(staged, min(staged.chunk.nbytes, PROBE_BYTES), into)
        assert self._memory.frames is not None
        self._memory.frames.release(into)
        return [frame]

    def _encode(self, staged: Staged, nbytes: int, into: Slot) -> tuple[str, tuple[int, ...]]:
        begun = time.perf_counter()
        encoder = self._memory.encoders.get()
        try:
            coding = coding_for(staged.chunk.dtype, self._byte_planes)
            coding, parts = encoder.encode(staged.slot.array[:nbytes], coding, into.array)
        finally:
            self._memory.encoders.put(encoder)
        self.chooser.encoded(nbytes, sum(parts), time.perf_counter() - begun)
        return coding, parts

    def _raw_frame(self, save: Save, staged: Staged, known_digest: str = "") -> Frame:
        chunk, slot, arena = staged.chunk, staged.slot, self._memory.slots
        assert arena is not None
        found = known_digest or digest(slot.array[: chunk.nbytes].data)
        reused = save.reuse.find(found, chunk.nbytes)
        return Frame(chunk, arena, slot, chunk.nbytes, "raw", (chunk.nbytes,), found, found, reused)


class _Feed:
    """One save's chunks on their way to the encoders; in the event loop."""

    def __init__(self, encoding: Encoding, save: Save, frames: Frames) -> None:
        self._encoding = encoding
        self._save = save
        self._frames = frames
        self._group: list[Staged] = []  # to be stored as they are, not yet on their way

    async def run(self) -> None:
        save = self._save
        while (staged := await self._next()) is not None:
            if staged.event is not None:
                await self._copied(staged)
            if self._frames.is_full:
                self._flush()
                save.watchdog.feeding("waiting for the chunks before it")
            await self._frames.reserve()
            pick = self._encoding.chooser.pick()
            if pick is Pick.RAW:
                self._group.append(staged)
            else:
                self._flush()
                await self._encode(staged, probe=pick is Pick.PROBE)
        self._flush()
        save.watchdog.feeding(Snapshot.STAGED.value)
        if save.snapshot in (Snapshot.STAGING, Snapshot.BROKEN):
            raise _left_early(save)
        if save.has_failed():
            raise SaveError("another part of the save has failed")
        if save.snapshot is Snapshot.QUEUED:
            save.to(Snapshot.STAGED)

    async def _next(self) -> Staged | None:
        """Wait for the next staged chunk; None once the thread that saves has left."""
        save, loop = self._save, asyncio.get_running_loop()
        if len(self._group) == GROUP_CHUNKS or not save.staged:
            self._flush()
        save.watchdog.feeding(save.snapshot.value)
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

    async def _copied(self, staged: Staged) -> None:
        """Wait until a chunk's copy from the device has ended, and nobody changed it meanwhile."""
        assert staged.event is not None
        if not staged.event.query():
            self._flush()
            self._save.watchdog.feeding(Snapshot.QUEUED.value)
            await call(self._encoding.io, staged.event.synchronize)
        if staged.late is not None:
            staged.late.settle(staged.chunk.index)

    async def _encode(self, staged: Staged, *, probe: bool) -> None:
        # In the order of the chunks, which is the order they are written in: otherwise later
        # chunks could take all frames, and the one that is waited for find none.
        encoding, save = self._encoding, self._save
        save.watchdog.feeding("waiting for memory to encode into")
        into = encoding.frame_slot(save, wait=False)
        if into is None:
            into = await call(encoding.io, encoding.frame_slot, save)
        if into is None:
            return  # the save has failed; go on to the end of the queue
        make = encoding.probe if probe else encoding.encode
        self._frames.put(call(encoding.encoders, make, save, staged, into))

    def _flush(self) -> None:
        """Let what is stored as it is be on its way: before whatever waits, and in order."""
        if self._group:
            encoding = self._encoding
            digests = call(encoding.encoders, encoding.digest_group, self._save, self._group)
            self._frames.put(digests)
            self._group = []


def _left_early(save: Save) -> BaseException:
    """Return why a save must fail whose snapshot is not complete."""
    cause = save.staging_error
    if isinstance(cause, Exception):
        return cause
    path = save.target.place.path
    error = SaveError(f"saving {path} was interrupted while the state was copied")
    error.__cause__ = cause
    save.left_early = error
    return error
