"""tune: what it measures is what saves would be, and it leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave.memory import CHUNK_BYTES
from asyncsave.storage.commit import begin
from asyncsave.storage.filesystem import LocalFileSystem


def state(mib: int = 4) -> dict[str, Any]:
    return {
        "w": torch.randn(mib << 18),
        "half": torch.randn(1 << 16).bfloat16(),
        "ids": np.arange(1 << 16, dtype=np.int32),
        "step": 7,
    }


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


def test_a_sample_stands_for_a_large_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["asyncsave.tune"], "_SAMPLE_BYTES", CHUNK_BYTES)
    # the first half compresses, the second does not
    large = {"w": torch.cat([torch.zeros(12 << 20), torch.randn(12 << 20)])}
    report = asyncsave.tune(large, directory=tmp_path, levels=[0], seconds=2)
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
    "options", [{"levels": []}, {"levels": [23]}, {"levels": ["1"]}, {"seconds": 0}], ids=str
)
def test_impossible_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(asyncsave.ConfigError):
        asyncsave.tune(state(), directory=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(asyncsave.StateError, match="nothing to tune"):
        asyncsave.tune({"step": 1}, directory=tmp_path)
    with pytest.raises(asyncsave.CheckpointNotFoundError):
        asyncsave.tune(tmp_path / "nothing")
    with pytest.raises(asyncsave.WriteError):
        asyncsave.tune(state(), directory="/proc/nothing")


def test_nothing_stays_when_it_is_interrupted(tmp_path: Path) -> None:
    def interrupt(done: float, what: str) -> None:
        if what.startswith("saving"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncsave.tune(state(), directory=tmp_path, levels=[1], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_is_swept(tmp_path: Path) -> None:
    left = begin(LocalFileSystem(), tmp_path / "tune")
    assert left.lock is not None
    left.lock.release()
    asyncsave.tune(state(), directory=tmp_path, levels=[0], seconds=1)
    assert list(tmp_path.iterdir()) == []
