"""Tune: which compression suits this state, these cores and this disk. Measured, not guessed.

    state or checkpoint ──▶ sample ──┬──▶ all encoders at once        ──▶ bytes per second
                                     └──▶ real saves, level by level  ──▶ seconds, stored bytes

A sample is whole chunks from all over the state, in an order in which every beginning of it is
spread as well: what a slow level is measured on is a beginning of what a fast one is. Saves of all
levels take turns, so that drift of the machine hits all alike. They go to a hidden directory on the
disk in question, named and locked like a save in flight: it is removed at the end, and if this
process is killed, by the next `tune` there.
"""

from __future__ import annotations

import os
import queue
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .codec.choose import Compression
from .codec.frame import Encoder, coding_for
from .errors import ConfigError, write_error
from .memory import CHUNK_BYTES, encoder_threads
from .pipeline import Pipeline
from .restore import PathLike
from .sample import Sample, sample_of_checkpoint, sample_of_state
from .snapshot.arena import available_memory
from .state.plan import dtype_name
from .storage.commit import Draft, begin, discard
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.manifest import digest
from .storage.reader import find
from .storage.retention import sweep
from .task import Target
from .workers import Workers

LEVELS = tuple(range(23))
ROUNDS = 5
_FEW_ROUNDS = 3  # what a sample is sized for
_SAMPLE_BYTES = 512 << 20
_ENCODE_CHUNKS = 4  # for each encoder, where that takes no more than its share of the time
_ENCODE_SHARE = 0.02  # of all the time, for one look at one level
_NOISE = 0.05
_SAME_SIZE = 0.005
_WORTH_SAYING = 0.02

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class TuneRow:
    """What one level costs and brings, for the whole state.

    Where ``sample_bytes`` is less than the state, times and lengths are those of the sample, scaled
    up to the state; what even an empty checkpoint takes is counted once.

    Attributes:
        level: 0 is off, 1 entropy coding alone, 2 to 22 zstd's; a value for ``compression=``.
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
        """The level that stores least; among those within half a percent, the soonest durable."""
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
            why = (
                f"durable after {_seconds(best.durable_seconds)}; compressing does not get there "
                f"sooner here (level {other.level}, the soonest, takes "
                f"{_seconds(other.durable_seconds)}) and costs CPU time"
            )
        else:
            why = f"durable after {_seconds(best.durable_seconds)}"
            off = next((row for row in self.rows if row.level == 0), None)
            if off is not None and best.level:
                why += f" instead of {_seconds(off.durable_seconds)}"
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


def tune(
    state_or_path: Any,
    *,
    directory: PathLike | None = None,
    levels: Iterable[int] | None = None,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> TuneReport:
    """Measure what each compression level would cost and bring, here and now.

    Real saves of (a sample of) the state are made in a hidden directory that is gone on return,
    however that comes; no checkpoint is touched. It measures what it finds: with a training on the
    same cores, levels look slower, as they then are.

    Args:
        state_or_path: a state as for ``save``; or the path of a checkpoint, or of a run directory,
            whose newest sound checkpoint is read.
        directory: where checkpoints will go, which is the disk to measure; if it is not there yet,
            its nearest parent that is. Default: where the checkpoint is, for a live state the
            current directory.
        levels: which to compare; default all, 0 to 22.
        seconds: how long it may take, about. Slow levels are measured on a smaller sample, and
            less often, or are skipped when the time is up.
        progress: called with the share of the time that is over, and what is being measured.

    Raises:
        ConfigError: an argument cannot be.
        StateError: the state cannot be saved, or holds nothing to compress.
        CheckpointNotFoundError, FormatError, IntegrityError: there is no sound checkpoint.
        WriteError: the directory cannot be written to.
    """
    began = time.perf_counter()
    chosen = _parse_levels(LEVELS if levels is None else levels)
    if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds={seconds!r} must be a positive number")
    filesystem = LocalFileSystem()
    is_path = isinstance(state_or_path, (str, os.PathLike))
    if directory is None and is_path:
        directory = _home(filesystem, Path(state_or_path))
    where = Path(os.path.abspath(directory or Path.cwd()))
    while not where.is_dir() and where != where.parent:
        where = where.parent
    most = min(_SAMPLE_BYTES, available_memory() // 8, shutil.disk_usage(where).free // 8)
    if is_path:
        sample = sample_of_checkpoint(filesystem, Path(state_or_path), most)
    else:
        sample = sample_of_state(state_or_path, most)
    try:
        sweep(filesystem, where, _NAME)
    except OSError as cause:
        raise write_error("read", where, cause) from cause
    draft = begin(filesystem, where / _NAME)
    try:
        measuring = _Measuring(filesystem, draft, sample, began, seconds, progress)
        measuring.run(chosen)
        rows = [measuring.row(each) for each in measuring.levels if each.durable_seconds]
        skipped = [each.level for each in measuring.levels if not each.durable_seconds]
    finally:
        discard(filesystem, draft)
    return TuneReport(
        rows=tuple(rows),
        skipped=tuple(skipped),
        state_bytes=sample.state_bytes,
        directory=where,
        encoders=encoder_threads(),
        seconds=time.perf_counter() - began,
    )


_NAME = "tune"


def _parse_levels(levels: Iterable[int]) -> list[int]:
    chosen = sorted({Compression(level).level for level in levels})
    if not chosen:
        raise ConfigError("levels= names no level: give some from 0 to 22")
    return chosen


def _home(filesystem: FileSystem, path: Path) -> Path:
    """Return the directory that the checkpoint, or the checkpoints of the run, are in."""
    return next(iter(find(filesystem, Path(os.path.abspath(path))))).parent


# -- measuring --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Level:
    """What was measured of one level."""

    level: int
    encode_seconds_per_byte: list[float] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    durable_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    ratio: float = 1.0
    took_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)


class _Measuring:
    """Encodes and saves a sample at several levels until the time is up."""

    def __init__(
        self,
        filesystem: FileSystem,
        draft: Draft,
        sample: Sample,
        began: float,
        seconds: float,
        progress: Progress | None,
    ) -> None:
        self.levels: list[_Level] = []
        self._filesystem = filesystem
        self._path = draft.path / "sample"
        self._sample = sample
        self._began = began
        self._seconds = seconds
        self._progress = progress or (lambda done, what: None)
        self._encoders = encoder_threads()
        self._frames = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(self._encoders)]
        self._empty_seconds = 0.0

    def run(self, levels: Sequence[int]) -> None:
        """Measure all levels, as often as there is time."""
        self.levels = [_Level(level) for level in levels]
        self._tell("the disk")
        empty = [torch.zeros(1)]
        self._empty_seconds = statistics.median(self._save(0, empty)[0] for _ in range(3))
        few = self._sample.first(0, 2 * self._encoders)
        began = time.perf_counter()
        self._save(0, few)
        disk = (time.perf_counter() - began) / sum(value.nbytes for value in few)
        for each in self.levels:
            if each.level:
                self._tell(f"encoding at level {each.level}")
                self._encode(each)
        share = self._left() / _FEW_ROUNDS / len(self.levels)
        for each in self.levels:
            encode = each.encode_seconds_per_byte[-1] if each.level else 0.0
            each.values = self._sample.first(share / (disk + 2 * encode), 1)
            each.took_seconds = each.nbytes * (disk + 2 * encode)
        order = random.Random(0)
        for round_ in range(ROUNDS):
            # low levels first, as long as not all have had their turn: they are what matters
            for each in order.sample(self.levels, len(self.levels)) if round_ else self.levels:
                if each.took_seconds <= self._left() or (each is self.levels[0] and not round_):
                    self._tell(f"saving at level {each.level}, round {round_ + 1}")
                    self._round(each, again=round_ > 0)

    def row(self, each: _Level) -> TuneRow:
        """Return what was measured, for the whole state."""
        scale = self._sample.state_bytes / each.nbytes
        durable = [
            self._empty_seconds + max(0.0, seconds - self._empty_seconds) * scale
            if scale > 1
            else seconds
            for seconds in each.durable_seconds
        ]
        encode = each.encode_seconds_per_byte
        return TuneRow(
            level=each.level,
            ratio=each.ratio,
            encode_bytes_per_second=1 / statistics.median(encode) if encode else None,
            durable_seconds=statistics.median(durable),
            durable_range_seconds=(min(durable), max(durable)),
            stored_bytes=round(self._sample.state_bytes / each.ratio),
            cpu_seconds=statistics.median(each.cpu_seconds) * scale,
            saves=len(durable),
            sample_bytes=each.nbytes,
        )

    def _left(self) -> float:
        return self._seconds - (time.perf_counter() - self._began)

    def _tell(self, what: str) -> None:
        self._progress(min(1.0, max(0.0, 1 - self._left() / self._seconds)), what)

    def _round(self, each: _Level, *, again: bool) -> None:
        began = time.perf_counter()
        if again and each.level:
            self._encode(each)
        durable, cpu, each.ratio = self._save(each.level, each.values)
        each.durable_seconds.append(durable)
        each.cpu_seconds.append(cpu)
        each.took_seconds = time.perf_counter() - began

    def _encode(self, each: _Level) -> None:
        """Encode some of the sample with all encoders, as a save does, but write nothing."""
        slowest = max(
            (s for other in self.levels for s in other.encode_seconds_per_byte), default=0
        )
        guess = (each.encode_seconds_per_byte or [slowest])[-1]
        most = float(min(_ENCODE_CHUNKS * self._encoders * CHUNK_BYTES, self._sample.state_bytes))
        if guess:
            most = min(most, _ENCODE_SHARE * self._seconds / guess)
        values = self._sample.first(most, self._encoders)
        free: queue.SimpleQueue[tuple[Encoder, np.ndarray[Any, Any]]] = queue.SimpleQueue()
        for frame in self._frames:
            free.put((Encoder(each.level, CHUNK_BYTES), frame))

        def encode(value: torch.Tensor) -> None:
            encoder, frame = free.get()
            raw = value.view(torch.uint8).numpy()
            digest(raw.data)
            _, parts = encoder.encode(raw, coding_for(dtype_name(value.dtype), True), frame)
            digest(frame[: sum(parts)].data)
            free.put((encoder, frame))

        workers = Workers("asyncsave-tune", self._encoders)
        try:
            began = time.perf_counter()
            for future in [workers.submit(encode, value) for value in values]:
                future.result()
            seconds = time.perf_counter() - began
        finally:
            workers.shutdown()
        each.encode_seconds_per_byte.append(seconds / sum(value.nbytes for value in values))

    def _save(self, level: int, values: list[torch.Tensor]) -> tuple[float, float, float]:
        """Save for real, and remove it; return seconds to durable, CPU seconds and the ratio."""
        state = {str(i): value for i, value in enumerate(values)}
        pipeline = Pipeline(
            self._filesystem,
            compression=Compression(level),
            memory_limit="auto",
            overlap=True,
            durable=True,
        )
        try:
            pipeline.prewarm(state)
            cpu = time.process_time()
            report = pipeline.save(state, Target(self._path), time.perf_counter()).result()
            cpu = time.process_time() - cpu
        finally:
            pipeline.close()
        self._filesystem.remove_tree(self._path)
        return report.durable_seconds, cpu, report.ratio
