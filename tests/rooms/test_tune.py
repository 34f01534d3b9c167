"""tune: what it measures is what saves would be, and it leaves nothing behind."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave import TuneReport, TuneRow
from asyncsave.pipeline.budget import CHUNK_BYTES
from asyncsave.storage.draft import Scratch
from asyncsave.storage.place import Place
from asyncsave.tuning import measure
from asyncsave.tuning.sample import Sample, sample_of_checkpoint, sample_of_state
from tests.doubles.disks import SmallDisk
from tests.doubles.fault_disk import FaultDisk, Faults


def state(mib: int = 4) -> dict[str, Any]:
    return {
        "w": torch.randn(mib << 18),
        "half": torch.randn(1 << 16).bfloat16(),
        "ids": np.arange(1 << 16, dtype=np.int32),
        "step": 7,
    }


ROOM = SmallDisk(8 * CHUNK_BYTES)
"""A disk with so much room, an eighth of which the sample may have."""


def test_a_live_state(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    report = asyncsave.tune(
        state(),
        directory=tmp_path,
        levels=[3, 0, 1],
        seconds=4,
        progress=lambda done, what: told.append((done, what)),
    )
    assert list(tmp_path.iterdir()) == []
    assert [row.level for row in report.rows] == [0, 1, 3]
    assert report.skipped == ()
    assert report.directory == tmp_path
    off, one, _ = report.rows
    assert (off.ratio, off.encode_bytes_per_second) == (pytest.approx(1, abs=0.02), None)
    assert one.ratio > 1.1
    saved = asyncsave.save(state(), tmp_path / "a", compression=1).result()
    assert one.ratio == pytest.approx(saved.ratio, rel=0.05)
    assert report.state_bytes == saved.raw_bytes
    for row in report.rows:
        low, high = row.durable_range_seconds
        assert 0 < low <= row.durable_seconds <= high
        assert row.saves >= 1
        assert row.cpu_seconds >= 0
    assert report.best in (0, 1, 3)
    assert report.smallest in (1, 3)
    named = f"compression={report.best}" if report.best else 'compression="off"'
    assert report.recommendation.startswith(f"Use {named}: ")
    assert all(0 <= done <= 1 for done, _ in told)
    assert "encoding at level 3" in {what for _, what in told}


def test_a_checkpoint_and_a_run_are_left_as_they_are(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path / "run", compression=1) as ckpt:
        ckpt.save(1, state())
        ckpt.save(2, state(), block=True)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        live = asyncsave.tune(tmp_path / "run", levels=[0, 1], seconds=1)
    one = asyncsave.tune(tmp_path / "run" / "step-000000001", levels=[1], seconds=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()
    assert live.directory == one.directory == tmp_path / "run"
    assert live.state_bytes == one.state_bytes
    assert one.rows[0].ratio > 1.1
    asyncsave.verify(tmp_path / "run")


def test_a_sample_stands_for_a_large_state(tmp_path: Path) -> None:
    # the first half compresses, the second does not
    large = {"w": torch.cat([torch.zeros(12 << 20), torch.randn(12 << 20)])}
    report = asyncsave.tune(large, directory=ROOM.at(tmp_path), levels=[0], seconds=2)
    (row,) = report.rows
    assert row.sample_bytes == CHUNK_BYTES
    assert report.state_bytes == 96 << 20
    assert row.stored_bytes == pytest.approx(96 << 20, rel=0.01)


def test_levels_without_time_are_named(tmp_path: Path) -> None:
    report = asyncsave.tune(state(), directory=tmp_path, levels=[0, 19], seconds=0.05)
    assert [row.level for row in report.rows] == [0]
    assert report.skipped == (19,)
    assert report.smallest == 0


@pytest.mark.parametrize(
    "options",
    [{"levels": []}, {"levels": [23]}, {"levels": ["1"]}, {"seconds": 0}, {"directory": ""}],
    ids=str,
)
def test_impossible_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(asyncsave.ConfigError):
        asyncsave.tune(state(), **{"directory": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(asyncsave.StateError, match="nothing to tune"):
        asyncsave.tune({"step": 1}, directory=tmp_path)
    with pytest.raises(asyncsave.CheckpointNotFoundError):
        asyncsave.tune(tmp_path / "nothing")
    for directory in ("/proc/nothing", tmp_path / ("x" * 300)):
        with pytest.raises(asyncsave.WriteError):
            asyncsave.tune(state(), directory=directory)


def test_nothing_stays_when_it_is_interrupted(tmp_path: Path) -> None:
    def interrupt(done: float, what: str) -> None:
        if what.startswith("saving"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncsave.tune(state(), directory=tmp_path, levels=[1], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_is_swept(tmp_path: Path) -> None:
    Scratch(Place(tmp_path / "tune")).unlock()
    assert len(list(tmp_path.iterdir())) == 1
    asyncsave.tune(state(), directory=tmp_path, levels=[0], seconds=1)
    assert list(tmp_path.iterdir()) == []


def test_a_state_with_short_chunks_is_measured_whole(tmp_path: Path) -> None:
    """Two of them once passed for all of a sample, and what they took was scaled up."""
    mixed = {"ids": torch.arange(1000), "w": torch.randn(3_000_000)}
    measured = asyncsave.tune(mixed, directory=tmp_path, levels=[0, 1, 3], seconds=1)
    for row in measured.rows:
        real = asyncsave.save(mixed, tmp_path / str(row.level), compression=row.level).result()
        assert row.sample_bytes == measured.state_bytes == real.raw_bytes
        assert row.stored_bytes == pytest.approx(real.stored_bytes, rel=0.001)
        assert row.durable_seconds < measured.seconds


def test_levels_that_saw_other_chunks_are_compared_on_the_same_ones(tmp_path: Path) -> None:
    """Level 9 has only seen chunks that shrink more than the others."""
    sample = Sample([torch.zeros(100, dtype=torch.uint8) for _ in range(4)], 40_000)
    # private: what is measured, nobody can choose
    measuring = measure._Measuring(Place(tmp_path), sample, 0.0, 1.0, None)
    off = measure._Level(0, values=sample.values, durable_seconds=[1.0], cpu_seconds=[1.0])
    one = measure._Level(1, [1e-9], [50, 50, 90, 90], sample.values, [1.0], [1.0])
    nine = measure._Level(9, [1e-8], [45, 45], sample.values[:2], [1.0], [1.0])
    measuring.levels = [off, one, nine]
    assert [measuring.row(each).stored_bytes for each in measuring.levels] == [
        40_000,
        pytest.approx(40_000 * 280 / 400),
        pytest.approx(40_000 * 280 / 400 * 90 / 100),
    ]


def test_a_level_that_cannot_be_best_is_saved_once(tmp_path: Path) -> None:
    measured = asyncsave.tune(
        {"w": torch.randn(3_000_000)}, directory=tmp_path, levels=[0, 19], seconds=15
    )
    off, slow = measured.rows
    assert slow.durable_seconds > 2 * off.durable_seconds
    assert slow.saves == 1 < off.saves


def raw(sample: Sample) -> list[bytes]:
    return sorted(value.view(torch.uint8).numpy().tobytes() for value in sample.values)


def test_a_live_state_and_its_checkpoint_are_the_same_sample(tmp_path: Path) -> None:
    large = {**state(20), "swapped": np.arange(1000, dtype=">i4"), "odd": b"x" * 1001}
    asyncsave.save(large, tmp_path / "a", memory_limit=8 << 20).result()  # in short chunks
    live = sample_of_state(large, 1 << 40)
    stored = sample_of_checkpoint(Place(tmp_path / "a"), 1 << 40)
    assert live.state_bytes == stored.state_bytes == sum(v.nbytes for v in live.values)
    assert raw(live) == raw(stored)
    assert sorted(str(v.dtype) for v in live.values) == sorted(str(v.dtype) for v in stored.values)
    assert {v.dtype for v in live.values} >= {torch.float32, torch.bfloat16, torch.int32}


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_sample_is_bounded_and_spread(most: int) -> None:
    chunks = 16
    large = torch.arange(chunks * CHUNK_BYTES // 4, dtype=torch.int32)
    short = {str(i): torch.zeros(1, dtype=d) for i, d in enumerate((torch.int8, torch.float64))}
    sample = sample_of_state({"x": large, **short}, most * CHUNK_BYTES)
    assert [value.nbytes for value in sample.values] == [CHUNK_BYTES] * most, "short ones come late"
    places = sorted(int(value[0]) * 4 // CHUNK_BYTES for value in sample.values)
    gaps = [after - before for before, after in itertools.pairwise([-1, *places, chunks])]
    assert max(gaps) <= 2.7 * chunks / most
    assert len(sample.first(0, 1)) == 1
    assert len(sample.first(1 << 40, 1)) == most


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, signals=()) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": torch.ones(step * 1000)}, block=True)
    data = tmp_path / "step-000000002" / "rank-00000.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert asyncsave.tune(tmp_path, levels=[0], seconds=0.1).state_bytes == 4000


def test_a_disk_with_little_room_gets_a_small_sample(tmp_path: Path) -> None:
    """Though the directory on it is not there yet."""
    place = ROOM.at(tmp_path / "run" / "deeper")
    measured = asyncsave.tune(state(48), directory=place, levels=[0], seconds=0.5)
    assert measured.directory == tmp_path
    assert measured.row(0).sample_bytes <= CHUNK_BYTES < measured.state_bytes


def test_every_operation_fails_once(tmp_path: Path) -> None:
    small = {"w": torch.ones(1000)}
    for i in range(300):
        faults = Faults(i, errno.ENOSPC)
        place = FaultDisk(faults).at(tmp_path)
        error: BaseException | None = None
        try:
            asyncsave.tune(small, directory=place, levels=[0], seconds=0.001)
        except (asyncsave.DiskFullError, asyncsave.CommitError) as caught:
            error = caught
        if faults.hit is None:
            break
        last = i == len(faults.operations) - 1 and faults.hit.kind == "remove_tree"
        assert (error is None) == last, faults.hit
        if last:  # it could not be removed: the next one does
            faults.at = -1
            asyncsave.tune(small, directory=place, levels=[0], seconds=0.001)
        assert list(tmp_path.iterdir()) == []
    else:
        pytest.fail("the sweep did not end")
    assert i > 30


# -- judging ----------------------------------------------------------------------------------


def row(level: int, seconds: float, stored: int = 100, cpu: float = 1.0, **more: Any) -> TuneRow:
    low, high = more.pop("range", (seconds, seconds))
    return TuneRow(level, 1000 / stored, 1e9, seconds, (low, high), stored, cpu, 3, 1000)


def report(*rows: TuneRow) -> TuneReport:
    return TuneReport(rows, (), 1000, Path("/disk"), 2, "compiled", 1.0)


def test_the_soonest_is_best() -> None:
    result = report(row(0, 2.0, 1000, 0.1), row(1, 1.5, 830, 0.5), row(9, 3.0, 790, 5.0))
    assert (result.best, result.smallest) == (1, 9)
    assert result.recommendation == (
        "Use compression=1: durable after 1.5 s instead of 2 s, in 17% less space; where space "
        "matters more than time, compression=9 stores 5% less and takes 3 s."
    )


def test_within_noise_the_cheapest_is_best() -> None:
    near = report(row(0, 1.04, 1000, 0.1), row(1, 1.0, 830, 0.5))
    assert near.best == 0
    clear = report(row(0, 1.3, 1000, 0.1), row(1, 1.0, 830, 0.5))
    assert clear.best == 1
    noisy = report(row(0, 1.3, 1000, 0.1, range=(0.9, 2.0)), row(1, 1.0, 830, 0.5))
    assert noisy.best == 0
    assert noisy.recommendation.startswith('Use compression="off": durable after 1.3 s; ')


def test_off_is_said_with_its_reason() -> None:
    result = report(row(0, 0.2, 1000, 0.1), row(1, 0.4, 830, 0.5), row(2, 0.5, 830, 0.6))
    assert (result.best, result.smallest) == (0, 1)
    assert result.recommendation == (
        'Use compression="off": durable after 0.2 s; compressing does not get there sooner here '
        "(level 1, the soonest, takes 0.4 s) and costs CPU time; where space matters more than "
        "time, compression=1 stores 17% less and takes 0.4 s."
    )


def test_one_percent_is_not_smaller() -> None:
    near = report(row(1, 0.4, 8300), row(14, 4.0, 8260), row(19, 20.0, 8230))
    assert near.smallest == 1
    assert report(row(1, 0.4, 8300), row(19, 20.0, 8000)).smallest == 19
