"""Report: what `tune` has measured of each level, and the setting that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_NOISE = 0.05  # times that differ by less are the same


_SAME_SIZE = 0.01


_WORTH_SAYING = 0.02


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
        kernel: what split elements into byte planes, "compiled" code or "NumPy".
        seconds: how long it took.
    """

    rows: tuple[TuneRow, ...]
    skipped: tuple[int, ...]
    state_bytes: int
    directory: Path
    encoders: int
    kernel: str
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
