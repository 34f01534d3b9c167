"""Reports: what a save cost, what a verification read, what a run has added up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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
        peak_memory_bytes: most memory the save took beside the live state: slots, frames, encoders.
        chunks: how many chunks were written.
        encoded_chunks: how many of them are stored compressed.
        tensors: how many tensors, arrays and long bytes the state had.
    """

    step: int | None
    path: Path
    blocked_seconds: float
    fence_seconds: float
    staged_seconds: float
    durable_seconds: float
    raw_bytes: int
    stored_bytes: int
    peak_memory_bytes: int
    chunks: int
    encoded_chunks: int
    tensors: int

    @property
    def ratio(self) -> float:
        """Raw bytes for each stored byte; above 1 is smaller on disk."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found sound. Damage is raised, not reported.

    Attributes:
        paths: the checkpoints, oldest first.
        chunks: how many chunks were read, checked, decoded and checked again.
        raw_bytes: what they decode to.
        stored_bytes: length of all files read.
        seconds: how long it took.
    """

    paths: tuple[Path, ...]
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
        raw_bytes, stored_bytes: in all.
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
        self.peak_memory_bytes = max(self.peak_memory_bytes, report.peak_memory_bytes)
        self.reports.append(report)
        del self.reports[:-100]
