"""Save: one save in flight. What it is to become, what it holds, how far it is."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..format.lineage import NO_LINEAGE, Lineage
from ..format.manifest import ChunkRecord
from ..report import SaveReport
from ..snapshot.arena import Arena, Slot
from ..snapshot.fence import LateCopies
from ..snapshot.snapshotter import Staged
from ..state.flatten import Flat
from ..state.plan import Chunk, Plan
from ..storage.writer import padded
from .handle import SaveHandle
from .watchdog import Watchdog

_log = logging.getLogger("asyncsave")


@dataclass(frozen=True, slots=True)
class Target:
    """What a save is to become.

    Attributes:
        path: the checkpoint's directory.
        step: the training step, or None.
        lineage: its place in a run.
        replace: a checkpoint that is there already is replaced.
        metrics: numbers by which retention may judge it.
        metadata: what the user wants to find in ``checkpoint.json``, encoded.
        then: called in the background once the checkpoint is durable, for retention.
    """

    path: Path
    step: int | None = None
    lineage: Lineage = NO_LINEAGE
    replace: bool = False
    metrics: dict[str, float | None] = field(default_factory=dict)
    metadata: object = None
    then: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Frame:
    """An encoded chunk: the first ``length`` bytes of ``slot``, which is of ``arena``."""

    chunk: Chunk
    arena: Arena
    slot: Slot
    length: int
    coding: str
    parts: tuple[int, ...]
    digest: str
    raw_digest: str

    def pad(self) -> int:
        """Fill its last page up with zeros; return how long all its pages are."""
        end = padded(self.length)
        self.slot.array[self.length : end] = 0
        return end

    def follows(self, other: Frame) -> bool:
        """Whether its bytes in memory follow right behind those of another one."""
        return (
            self.arena is other.arena
            and self.slot.index == other.slot.index + 1
            and other.length == other.slot.nbytes
        )


class Save:
    """The state of one save in flight.

    The thread that saves holds ``staging`` for as long as it copies, and sets ``complete`` as the
    last thing in it. However it leaves (done, or by an error, or by an interrupt at any point), the
    lock is free then: a ``with`` on it is entered and left in one step each. So the background
    knows that nothing more will come, whether or not anybody could tell it; see `Stages.next`.

    Attributes:
        staging: held by the thread that saves; free once it has left.
        staged: chunks that it has copied, in order.
        wake: set when there may be more of them, or no more.
        complete: it has copied all, or stopped since the save had ``failed``.
        staging_error: what made it leave before that, if it could be noted.
        failed: whoever works for this save may stop.
    """

    def __init__(
        self,
        target: Target,
        flat: Flat,
        plan: Plan,
        handle: SaveHandle,
        watchdog: Watchdog,
        began: float,
    ) -> None:
        self.target = target
        self.tree = flat.tree
        self.names = flat.names
        self.plan = plan
        self.handle = handle
        self.watchdog = watchdog
        self.began = began
        self.late: LateCopies | None = None
        self.staging = threading.Lock()
        self.staged: collections.deque[Staged] = collections.deque()
        self.wake = asyncio.Event()
        self.complete = False
        self.staging_error: BaseException | None = None
        self.failed = False
        self.blocked_seconds = 0.0
        self.staged_seconds = 0.0
        self.chunks: dict[int, ChunkRecord] = {}

    def has_failed(self) -> bool:
        """Whether whoever waits for this save may give up."""
        return self.failed

    def fail(self, arenas: Iterable[Arena]) -> None:
        """Stop whoever works for this save, or waits in one of ``arenas``."""
        self.failed = True
        for arena in arenas:
            arena.wake()

    def note_staged(self) -> None:
        """Note that the snapshot is taken."""
        self.staged_seconds = self.elapsed()
        self.handle._set_staged()

    def report(self, stored_bytes: int, peak_memory_bytes: int) -> SaveReport:
        """Return what the save has cost, now that it is durable; waits for the fence's figures."""
        durable_seconds = self.elapsed()
        return SaveReport(
            step=self.target.step,
            path=self.target.path,
            blocked_seconds=self.blocked_seconds,
            fence_seconds=self._fence_seconds(),
            staged_seconds=self.staged_seconds,
            durable_seconds=durable_seconds,
            raw_bytes=self.plan.nbytes,
            stored_bytes=stored_bytes,
            peak_memory_bytes=peak_memory_bytes,
            chunks=len(self.chunks),
            encoded_chunks=sum(chunk.coding != "raw" for chunk in self.chunks.values()),
            tensors=len(self.names),
        )

    def _fence_seconds(self) -> float:
        if self.late is None:
            return 0.0
        try:
            return self.late.fence_seconds()
        except Exception:
            # The device is in an error of the training's, say. The checkpoint is durable all the
            # same, and must not be called a failure for want of a figure.
            _log.exception("how long the training stood at the fence is not known; it counts as 0")
            return 0.0

    def elapsed(self) -> float:
        """Return the seconds since the save was called for."""
        return time.perf_counter() - self.began
