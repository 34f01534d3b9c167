"""Measure: which compression suits this state, these cores and this disk. Measured, not guessed.

    state or checkpoint ──▶ sample ──┬──▶ all encoders at once        ──▶ bytes per second, sizes
                                     └──▶ real saves, level by level  ──▶ seconds to durable

Slow levels are measured on the beginning of the sample only. Saves of all levels take turns, so
that drift of the machine hits all alike. They go to a hidden directory on the disk in question,
named and locked like a save in flight: it is removed at the end, and if this process is killed, by
the next `tune` there.
"""

from __future__ import annotations

import os
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..available import available_memory
from ..codec import kernel
from ..codec.compression import Compression
from ..codec.frame import Encoder, coding_for
from ..errors import ConfigError, looking
from ..format.records import digest
from ..pipeline.budget import CHUNK_BYTES, encoder_threads
from ..pipeline.pipeline import Pipeline
from ..pipeline.target import OnDisk, Target
from ..pipeline.workers import Workers
from ..reading.newest import find
from ..state.layout import dtype_name
from ..storage.draft import Scratch
from ..storage.place import PathLike, Place, place_of
from ..storage.steps import sweep
from .report import TuneReport, TuneRow
from .sample import Sample, sample_of_checkpoint, sample_of_state

LEVELS = tuple(range(23))
ROUNDS = 5
_SAMPLE_BYTES = 512 << 20
_ENCODE_SHARE = 0.01  # of all the time, for one look at how one level encodes
_FIRST_ROUND = 0.5  # of the time that is left then, for one save at each level
_HOPELESS = 2.0  # times the soonest: a level that takes longer need not be looked at again
_NAME = "tune"

Progress = Callable[[float, str], None]


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
        SaveError, CommitError: the directory cannot be looked at, or not be written to.
    """
    began = time.perf_counter()
    chosen = _parse_levels(LEVELS if levels is None else levels)
    if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds={seconds!r} must be a positive number")
    is_path = isinstance(state_or_path, (str, os.PathLike))
    if directory is None:
        directory = find(place_of(state_or_path)).line[0].place.parent if is_path else os.curdir
    where, free_bytes = _disk_of(place_of(directory))
    most = min(_SAMPLE_BYTES, available_memory() // 8, free_bytes // 8)
    if is_path:
        sample = sample_of_checkpoint(place_of(state_or_path), most)
    else:
        sample = sample_of_state(state_or_path, most)
    with looking(where.path):
        sweep(where, _NAME)
    scratch = Scratch(where / _NAME)
    try:
        measuring = _Measuring(scratch.place, sample, began, seconds, progress)
        measuring.run(chosen)
        return measuring.report(where.path)
    finally:
        scratch.remove()


def _disk_of(place: Place) -> tuple[Place, int]:
    """Return the nearest directory there is, and how many bytes its disk has free."""
    with looking(place.path):
        while not place.is_directory(follow=True) and place != place.parent:
            place = place.parent
        return place, place.free_bytes()


def _parse_levels(levels: Iterable[int]) -> list[int]:
    chosen = sorted({Compression(level).level for level in levels})
    if not chosen:
        raise ConfigError("levels= names no level: give some from 0 to 22")
    return chosen


# -- measuring --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Level:
    """What was measured of one level.

    Attributes:
        sizes: to how many bytes the first chunks of the sample were encoded.
        values: what is saved: a beginning of the sample.
        took_seconds: what a turn of it takes.
    """

    level: int
    encode_seconds_per_byte: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    durable_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    stored_bytes: int = 0
    took_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return _length(self.values)


class _Measuring:
    """Encodes and saves a sample at several levels until the time is up."""

    def __init__(
        self,
        scratch: Place,
        sample: Sample,
        began: float,
        seconds: float,
        progress: Progress | None,
    ) -> None:
        self.levels: list[_Level] = []
        self._place = scratch / "sample"
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
        self._plan()
        for each in self.levels:  # low levels first: if the time is up, high ones miss least
            if each is self.levels[0] or each.took_seconds <= self._left():
                self._turn(each, 0)
        order = random.Random(0)
        for round_ in range(1, ROUNDS):
            contenders = self._contenders()
            for each in order.sample(contenders, len(contenders)):
                if each.took_seconds <= self._left():
                    self._turn(each, round_)
        self._progress(1.0, "")

    def _plan(self) -> None:
        """Find out what a turn of each level takes, and how much of the sample it can save."""
        self._tell("the disk")
        empty = [torch.zeros(1, device="cpu")]
        self._empty_seconds = statistics.median(self._save(0, empty)[0] for _ in range(3))
        few = self._sample.first(0, 2 * self._encoders)
        fixed, with_few = (self._turn_seconds(values) for values in (empty, few))
        disk = max(with_few - fixed, 0.1 * with_few) / _length(few)
        for each in self.levels:
            if each.level:
                self._tell(f"encoding at level {each.level}")
                self._encode(each)
        share = self._left() * _FIRST_ROUND / len(self.levels)
        for each in self.levels:
            cost = disk + (each.encode_seconds_per_byte[-1] if each.level else 0.0)
            each.values = self._sample.first((share - fixed) / cost, self._encoders)
            each.took_seconds = fixed + each.nbytes * cost

    def report(self, directory: Path) -> TuneReport:
        """Return what was measured, in this directory."""
        return TuneReport(
            rows=tuple(self.row(each) for each in self.levels if each.durable_seconds),
            skipped=tuple(each.level for each in self.levels if not each.durable_seconds),
            state_bytes=self._sample.state_bytes,
            directory=directory,
            encoders=self._encoders,
            kernel=kernel.NAME,
            seconds=time.perf_counter() - self._began,
        )

    def row(self, each: _Level) -> TuneRow:
        """Return what was measured, for the whole state."""
        state_bytes = self._sample.state_bytes
        scale = state_bytes / each.nbytes
        durable = [
            self._empty_seconds + max(0.0, seconds - self._empty_seconds) * scale
            if scale > 1
            else seconds
            for seconds in each.durable_seconds
        ]
        encode = each.encode_seconds_per_byte
        stored = each.stored_bytes if scale == 1 else round(state_bytes * self._fraction(each))
        return TuneRow(
            level=each.level,
            ratio=state_bytes / stored,
            encode_bytes_per_second=1 / statistics.median(encode) if encode else None,
            durable_seconds=statistics.median(durable),
            durable_range_seconds=(min(durable), max(durable)),
            stored_bytes=stored,
            cpu_seconds=statistics.median(each.cpu_seconds) * scale,
            saves=len(durable),
            sample_bytes=each.nbytes,
        )

    def _fraction(self, each: _Level) -> float:
        """Return to what fraction of its bytes a level encodes the state.

        Other chunks shrink otherwise. So of a level that has encoded few, it is what the one that
        has encoded most makes of all its chunks, times how the two compare on the same ones.
        """
        if not each.level:
            return 1.0
        most = max(self.levels, key=lambda other: len(other.sizes))
        of_most = sum(most.sizes) / _length(self._sample.values[: len(most.sizes)])
        return of_most * sum(each.sizes) / sum(most.sizes[: len(each.sizes)])

    def _contenders(self) -> list[_Level]:
        """Return the levels that may still turn out to be the best."""
        measured = {each.level: each for each in self.levels if each.durable_seconds}
        seconds = {level: self.row(each).durable_seconds for level, each in measured.items()}
        soonest = min(seconds.values())
        return [each for level, each in measured.items() if seconds[level] <= soonest * _HOPELESS]

    def _left(self) -> float:
        return self._seconds - (time.perf_counter() - self._began)

    def _tell(self, what: str) -> None:
        self._progress(min(1.0, max(0.0, 1 - self._left() / self._seconds)), what)

    def _turn_seconds(self, values: list[torch.Tensor]) -> float:
        began = time.perf_counter()
        self._save(0, values)
        return time.perf_counter() - began

    def _turn(self, each: _Level, round_: int) -> None:
        self._tell(f"saving at level {each.level}, round {round_ + 1}")
        began = time.perf_counter()
        if each.level and round_:
            self._encode(each)
        durable, cpu, each.stored_bytes = self._save(each.level, each.values)
        each.durable_seconds.append(durable)
        each.cpu_seconds.append(cpu)
        each.took_seconds = time.perf_counter() - began

    def _encode(self, each: _Level) -> None:
        """Encode some of the sample with all encoders, as a save does, but write nothing."""
        known = [s for other in self.levels for s in other.encode_seconds_per_byte]
        guess = (each.encode_seconds_per_byte or [max(known, default=1e-8)])[-1]
        values = self._sample.first(_ENCODE_SHARE * self._seconds / guess, self._encoders)
        free: queue.SimpleQueue[tuple[Encoder, np.ndarray[Any, Any]]] = queue.SimpleQueue()
        for frame in self._frames:
            free.put((Encoder(each.level, CHUNK_BYTES), frame))

        def encode(value: torch.Tensor) -> int:
            encoder, frame = free.get()
            raw = value.view(torch.uint8).numpy()
            digest(raw.data)
            _, parts = encoder.encode(raw, coding_for(dtype_name(value.dtype), True), frame)
            digest(frame[: sum(parts)].data)
            free.put((encoder, frame))
            return sum(parts)

        workers = Workers("asyncsave-tune", self._encoders)
        try:
            began = time.perf_counter()
            sizes = [each.result() for each in [workers.submit(encode, v) for v in values]]
            seconds = time.perf_counter() - began
        finally:
            workers.shutdown()
        each.encode_seconds_per_byte.append(seconds / _length(values))
        each.sizes = max(each.sizes, sizes, key=len)

    def _save(self, level: int, values: list[torch.Tensor]) -> tuple[float, float, int]:
        """Save for real and remove it; return seconds to durable, CPU seconds, stored bytes."""
        state = {str(i): value for i, value in enumerate(values)}
        pipeline = Pipeline(
            compression=Compression(level),
            memory_limit="auto",
            overlap=True,
            on_disk=OnDisk(reuse="off"),
        )
        try:
            pipeline.prewarm(state)
            cpu = time.process_time()
            report = pipeline.save(state, Target(self._place), time.perf_counter()).result()
            cpu = time.process_time() - cpu
        finally:
            pipeline.close()
        self._place.remove()
        return report.durable_seconds, cpu, report.stored_bytes


def _length(values: Iterable[torch.Tensor]) -> int:
    return sum(value.nbytes for value in values)
