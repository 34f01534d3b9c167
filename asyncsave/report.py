"""Reports: what a save cost, what a restore and a verification did, sums, what tune found."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NOISE = 0.05  # times that differ by less are the same
_SAME_SIZE = 0.01
_WORTH_SAYING = 0.02


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

    def __str__(self) -> str:
        name = self.path if self.step is None else f"step {self.step}"
        where = "" if self.step is None else f": {self.path}"
        return (
            f"saved {name}, {gb(self.raw_bytes)} as {gb(self.stored_bytes)}, durable after "
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
        stored_bytes: length of its files; None where that cannot be told.
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
    stored_bytes: int | None
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


@dataclass(frozen=True, slots=True)
class TuneRow:
    """What one level costs and brings, for the whole state.

    Where ``sample_bytes`` is less than the state, times are those of the sample, scaled up to the
    state; what even an empty checkpoint takes is counted once. Lengths are estimated as well then.

    Attributes:
        level: 0 is off, 1 entropy coding alone, 2 to 22 zstd's levels: as ``compression=``.
        ratio: raw bytes for each stored byte.
        encode_bytes_per_second: raw bytes, all encoders together; None for 0.
        durable_seconds: from the call of ``save`` until durable, into warm memory; the median.
        durable_range_seconds: the smallest and the largest of them.
        stored_bytes: length of the checkpoint.
        cpu_seconds: CPU time that this process spent meanwhile; the median.
        saves: how many saves the medians are of.
        sample_bytes: how much of the state these were of.
    """

    level: int
    ratio: float
    encode_bytes_per_second: float | None
    durable_seconds: float
    durable_range_seconds: tuple[float, float]
    stored_bytes: int
    cpu_seconds: float
    saves: int
    sample_bytes: int


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What `tune` has measured.

    Attributes:
        rows: one for each level that was measured, ascending.
        skipped: levels for which there was not enough time.
        state_bytes: length of everything with bulk in the state.
        directory: on which disk the saves were.
        encoders: how many threads encoded.
        seconds: how long it took.
    """

    rows: tuple[TuneRow, ...]
    skipped: tuple[int, ...]
    state_bytes: int
    directory: Path
    encoders: int
    seconds: float

    def row(self, level: int) -> TuneRow:
        """Return the row of a level that was measured."""
        return next(row for row in self.rows if row.level == level)

    @property
    def best(self) -> int:
        """The level that is durable soonest; among those not slower beyond noise, the one that
        costs the least CPU time.
        """
        soonest = min(row.durable_seconds for row in self.rows)
        good = [
            row
            for row in self.rows
            if row.durable_seconds <= soonest * (1 + _NOISE)
            or row.durable_range_seconds[0] <= soonest
        ]
        return min(good, key=lambda row: row.cpu_seconds).level

    @property
    def smallest(self) -> int:
        """The level that stores least; among those within one percent, the soonest durable."""
        least = min(row.stored_bytes for row in self.rows)
        good = [row for row in self.rows if row.stored_bytes <= least * (1 + _SAME_SIZE)]
        return min(good, key=lambda row: row.durable_seconds).level

    @property
    def recommendation(self) -> str:
        """One sentence that names the setting to use, and why."""
        best, smallest = self.row(self.best), self.row(self.smallest)
        others = [row for row in self.rows if row.level > 0]
        if best.level == 0 and others:
            other = min(others, key=lambda row: row.durable_seconds)
            sooner = other.durable_seconds < best.durable_seconds
            why = (
                f"durable after {_seconds(best.durable_seconds)}; compressing does not get there "
                f"{'reliably ' if sooner else ''}sooner here (level {other.level}, the soonest, "
                f"takes {_seconds(other.durable_seconds)}"
                f"{', and as long at times' if sooner else ''}) and costs CPU time"
            )
        else:
            why = f"durable after {_seconds(best.durable_seconds)}"
            off = next((row for row in self.rows if row.level == 0), None)
            if off is not None and best.level:
                why += f" instead of {_seconds(off.durable_seconds)}"
                if best.ratio > 1:
                    why += f", in {1 - 1 / best.ratio:.0%} less space"
        saved = 1 - smallest.stored_bytes / best.stored_bytes
        if saved >= _WORTH_SAYING:
            why += (
                f"; where space matters more than time, {_setting(smallest.level)} stores "
                f"{saved:.0%} less and takes {_seconds(smallest.durable_seconds)}"
            )
        return f"Use {_setting(best.level)}: {why}."


def _setting(level: int) -> str:
    return f"compression={level}" if level else 'compression="off"'


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def gb(nbytes: int) -> str:
    """Return a length as people read it: ``1.62 GB``, ``4.1 kB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
