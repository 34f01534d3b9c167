"""Reports: what a save cost, what a restore and a verification did, sums, what tune found."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What one save cost. All times are wall time from the call of ``save``, in seconds.

    Attributes:
        step: the training step, or None for a checkpoint without one.
        path: the committed checkpoint.
        blocked_seconds: how long the call kept the training thread, waiting for memory or for an
            earlier save included.
        fence_seconds: how long training then stood still before ``optimizer.step()``, on the CPU
            and on the device together; 0 where everything was staged in the call.
        staged_seconds: until the snapshot no longer depended on live tensors.
        durable_seconds: until the checkpoint was committed and synced (only committed, with
            ``durable=False``).
        raw_bytes: length of everything with bulk in the state, each tie counted once.
        stored_bytes: length of the files that were written, manifests and padding included.
        shared_bytes: length of what has not changed since the last checkpoint, and was linked and
            not written.
        peak_memory_bytes: most memory the save took beside the live state: slots, frames, encoders.
        chunks: how many chunks the checkpoint has.
        shared_chunks: how many of them were not written.
        encoded_chunks: how many of them are stored compressed.
        tensors: how many tensors, arrays and long bytes the state had.
        kernel: what splits elements into byte planes, "compiled" code or "NumPy".
    """

    step: int | None
    path: Path
    blocked_seconds: float
    fence_seconds: float
    staged_seconds: float
    durable_seconds: float
    raw_bytes: int
    stored_bytes: int
    shared_bytes: int
    peak_memory_bytes: int
    chunks: int
    shared_chunks: int
    encoded_chunks: int
    tensors: int
    kernel: str

    @property
    def ratio(self) -> float:
        """Raw bytes for each stored or shared byte; above 1 is smaller on disk."""
        stored = self.stored_bytes + self.shared_bytes
        return self.raw_bytes / stored if stored else 1.0

    def __str__(self) -> str:
        name = self.path if self.step is None else f"step {self.step}"
        where = "" if self.step is None else f": {self.path}"
        shared = f" and {gb(self.shared_bytes)} shared" if self.shared_bytes else ""
        return (
            f"saved {name}, {gb(self.raw_bytes)} as {gb(self.stored_bytes)}{shared}, durable after "
            f"{self.durable_seconds:.2f} s, of which the training was blocked for "
            f"{self.blocked_seconds + self.fence_seconds:.3f} s{where}"
        )


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of one checkpoint of a run.

    Attributes:
        step: the training step, or None for a checkpoint without one.
        path: its directory.
        time: when it was written, in UTC; None where that cannot be read.
        metrics: what was given to ``step`` or ``save``; None for what was not finite.
        metadata: what was given to ``step`` or ``save``.
        files: the names of the files beside the state, which are in its directory.
        stored_bytes: length of its own files; None where that cannot be told.
        shared_bytes: what it has beside them in data files of earlier checkpoints, which are linked
            into it: what both have is on the disk once.
        newest: `restore` begins with this one.
        left: a rollback left it: it is restored only when its step is asked for.
        sound: whether every byte is what was written; None: that was not looked at.
        error: what is damaged, if it is not sound.
    """

    step: int | None
    path: Path
    time: datetime.datetime | None
    metrics: dict[str, float | None]
    metadata: Any
    files: tuple[str, ...]
    stored_bytes: int | None
    shared_bytes: int
    newest: bool
    left: bool
    sound: bool | None
    error: str


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did. Names are fqns in the state that was filled.

    Attributes:
        path: the checkpoint.
        step: the training step, or None for a checkpoint without one.
        loaded: tensors and arrays that were filled, objects that loaded, values that were replaced.
        missing: what only the state has; it stays as it was.
        unexpected: what only the checkpoint has.
        cast: tensors whose dtype was converted.
        seconds: how long it took.
    """

    path: Path
    step: int | None
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cast: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found sound. Damage is raised, not reported.

    Attributes:
        paths: the checkpoints, in the order they were committed.
        newest: the one that `restore` and `load` take.
        chunks: how many chunks were read, checked, decoded and checked again.
        raw_bytes: what they decode to.
        stored_bytes: length of all files read.
        seconds: how long it took.
    """

    paths: tuple[Path, ...]
    newest: Path
    chunks: int
    raw_bytes: int
    stored_bytes: int
    seconds: float


@dataclass(slots=True)
class Stats:
    """Running sums over the saves of a Checkpointer.

    Attributes:
        saves: committed ones.
        failures: saves that were not committed.
        skipped: steps that were due and passed over, because of ``on_busy="skip"``.
        blocked_seconds, fence_seconds: what training waited, in all.
        raw_bytes, stored_bytes, shared_bytes: in all.
        peak_memory_bytes: of the save that took most.
        reports: of the last 100 saves.
        passed_over: checkpoints that ``restore`` or ``load`` could not use, and why.
    """

    saves: int = 0
    failures: int = 0
    skipped: int = 0
    blocked_seconds: float = 0.0
    fence_seconds: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0
    shared_bytes: int = 0
    peak_memory_bytes: int = 0
    reports: list[SaveReport] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, report: SaveReport | None) -> None:
        """Count a save that has ended; None: it failed."""
        if report is None:
            self.failures += 1
            return
        self.saves += 1
        self.blocked_seconds += report.blocked_seconds
        self.fence_seconds += report.fence_seconds
        self.raw_bytes += report.raw_bytes
        self.stored_bytes += report.stored_bytes
        self.shared_bytes += report.shared_bytes
        self.peak_memory_bytes = max(self.peak_memory_bytes, report.peak_memory_bytes)
        self.reports.append(report)
        del self.reports[:-100]


def gb(nbytes: int) -> str:
    """Return a length as people read it: ``1.62 GB``, ``4.1 kB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
