"""Save: one save in flight, as a table of states, and what its threads share.

Two machines, as writing begins while later chunks are still being copied:

    snapshot   STAGING ─┬▶ QUEUED ──▶ STAGED       the thread that saves; at last the event loop
                        ├───────────────▲
                        └▶ BROKEN
    file       CREATING ▶ WRITING ▶ SEALING ▶ PUBLISHING ▶ DURABLE ▶ DONE        the event loop
                  └──────────┴─────────┴──────────┴──▶ UNDOING ▶ FAILED
                                                  └──▶ UNKNOWN

and one rule between them: a file is sealed only of a snapshot that is STAGED. `Save.to` is the only
way from one state to the next; it refuses all others, so no error can undo what is DURABLE. What is
said of a save that stands still, and when it was staged and durable, comes from here, too.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import threading
import time
from collections.abc import Iterable

from ..codec import kernel
from ..format.records import ChunkRecord
from ..report import SaveReport
from ..snapshot.arena import Arena
from ..snapshot.fence import LateCopies
from ..snapshot.snapshotter import Staged
from ..state.changes import Versions
from ..state.chunks import Plan
from ..state.flatten import Flat
from .handle import SaveHandle, log_exception
from .reuse import Reuse
from .target import Target
from .watchdog import Watchdog


class Snapshot(enum.Enum):
    """How far the copies of a save's state are; the value is what is said if they stand still."""

    STAGING = "copying the state in the thread that saves"
    QUEUED = "copying from the device"
    STAGED = "encoding the last chunks"
    BROKEN = "waiting for what is at work to stop"


class State(enum.Enum):
    """How far a save's files are; the value is what is said if they stand still."""

    CREATING = "creating files"
    WRITING = ""  # what its end waits for, or what the snapshot does
    SEALING = "syncing the data file"
    PUBLISHING = "syncing and committing"
    DURABLE = "removing older checkpoints"
    DONE = "done"
    UNDOING = "cleaning up after it failed"
    FAILED = "failed"
    UNKNOWN = "in place, but perhaps not on disk"


NEXT: dict[Snapshot | State, set[Snapshot | State]] = {
    Snapshot.STAGING: {Snapshot.QUEUED, Snapshot.STAGED, Snapshot.BROKEN},
    Snapshot.QUEUED: {Snapshot.STAGED},
    Snapshot.STAGED: set(),
    Snapshot.BROKEN: set(),
    State.CREATING: {State.WRITING, State.UNDOING},
    State.WRITING: {State.SEALING, State.UNDOING},
    State.SEALING: {State.PUBLISHING, State.UNDOING},
    State.PUBLISHING: {State.DURABLE, State.UNDOING, State.UNKNOWN},
    State.DURABLE: {State.DONE},
    State.DONE: set(),
    State.UNDOING: {State.FAILED},
    State.FAILED: set(),
    State.UNKNOWN: set(),
}


class Save:
    """One save in flight.

    The thread that saves holds ``staging`` for as long as it copies, and says as the last thing in
    it what became of the snapshot. However it leaves (done, or by an error, or by an interrupt at
    any point), the lock is free then: a ``with`` on it is entered and left in one step each. So the
    background knows that nothing more will come, whether or not anybody could tell it; see
    `encode._Feed`.

    Attributes:
        target, tree, names, plan, handle, watchdog: given; nobody changes them.
        began: when the caller was called (``time.perf_counter``).
        late: the copies that may go on after the call, if there are any.
        snapshot, state: how far it is, see `to`.
        staging: held by the thread that saves; free once it has left.
        staged: chunks that it has copied, in order. It appends, the event loop takes.
        staging_error: what made it leave before all was copied, if it could be noted.
        wake: set when there may be more of them, or no more.
        left_early: the error of the background that tells of that; the caller knows it already.
        versions: of its tensors, where they decide what is copied.
        reuse: what it may take from an earlier checkpoint.
        chunks: where each chunk is in its data file, by index. The event loop's.
        reused: those that are in a file of an earlier checkpoint, by index: records of that one.
        taken: files and offsets of those.
        blocked_seconds, staged_seconds, durable_seconds: how long after ``began`` the call
            returned, and the states STAGED and DURABLE were reached.
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
        self.snapshot = Snapshot.STAGING
        self.state = State.CREATING
        self.staging = threading.Lock()
        self.staged: collections.deque[Staged] = collections.deque()
        self.staging_error: BaseException | None = None
        self.wake = asyncio.Event()
        self.left_early: BaseException | None = None
        self.versions: Versions | None = None
        self.reuse = Reuse()
        self.chunks: dict[int, ChunkRecord] = {}
        self.reused: dict[int, ChunkRecord] = {}
        self.taken: set[tuple[int, int]] = set()
        self.blocked_seconds = self.staged_seconds = self.durable_seconds = 0.0

    def to(self, state: Snapshot | State) -> None:
        """Go on to the next state of one of the two machines.

        Raises:
            RuntimeError: the table has no such arrow; nothing was changed.
        """
        now = self.snapshot if isinstance(state, Snapshot) else self.state
        if state not in NEXT[now]:
            raise RuntimeError(f"a save goes from {now} to one of {NEXT[now]}, not to {state}")
        if state is State.SEALING and self.snapshot is not Snapshot.STAGED:
            raise RuntimeError(f"a save whose snapshot is {self.snapshot} cannot be sealed")
        if isinstance(state, Snapshot):
            self.snapshot = state
            if state is Snapshot.STAGED:
                self.staged_seconds = self.elapsed()
                self.handle._set_staged()
            return
        self.state = state
        if state is State.DURABLE:
            self.durable_seconds = self.elapsed()
        self.watchdog.writing(state.value)

    def has_failed(self) -> bool:
        """Whether whoever works or waits for this save may give up."""
        return self.snapshot is Snapshot.BROKEN or self.state in (State.UNDOING, State.FAILED)

    def stop(self, arenas: Iterable[Arena]) -> None:
        """Begin to undo it, and let who works for it see that, or waits in one of ``arenas``."""
        if self.state is not State.UNDOING:
            self.to(State.UNDOING)
            for arena in arenas:
                arena.wake()

    def report(self, stored_bytes: int, peak_memory_bytes: int) -> SaveReport:
        """Return what the save has cost, now that it is durable; waits for the fence's figures."""
        return SaveReport(
            step=self.target.step,
            path=self.target.place.path,
            blocked_seconds=self.blocked_seconds,
            fence_seconds=self._fence_seconds(),
            staged_seconds=self.staged_seconds,
            durable_seconds=self.durable_seconds,
            raw_bytes=self.plan.layout.nbytes,
            stored_bytes=stored_bytes,
            shared_bytes=self._shared_bytes(),
            peak_memory_bytes=peak_memory_bytes,
            chunks=len(self.chunks),
            shared_chunks=len(self.reused),
            encoded_chunks=sum(chunk.coding != "raw" for chunk in self.chunks.values()),
            tensors=len(self.names),
            kernel=kernel.NAME,
        )

    def _shared_bytes(self) -> int:
        return sum(each.length for each in self.reused.values())

    def _fence_seconds(self) -> float:
        if self.late is None:
            return 0.0
        try:
            return self.late.fence_seconds()
        except Exception:
            # The device is in an error of the training's, say. The checkpoint is durable all the
            # same, and must not be called a failure for want of a figure.
            log_exception("how long the training stood at the fence is not known; it counts as 0")
            return 0.0

    def elapsed(self) -> float:
        """Return the seconds since the save was called for."""
        return time.perf_counter() - self.began
