"""compression="auto": what is chosen, given what was measured."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from pathlib import Path

import pytest
import torch

from asyncsave import Checkpointer, Compression
from asyncsave.pipeline.choose import AUTO_LEVEL, TRY, TRY_BYTES, Chooser
from asyncsave.storage.filesystem import LocalFileSystem, WritableFile

CHUNK = 16 << 20
ENCODERS = 2
RATIO = 0.84


def save(
    chooser: Chooser, chunks: int, disk: float, encoder: float, sync_seconds: float = 0.0
) -> list[bool]:
    """Tell ``chooser`` of a save at these bytes per second; return which chunks it encoded.

    Two chunks are always on the way: what a chunk took is known when the next but one is picked.
    """
    chooser.begin_save()
    picks: list[int] = []

    def end(level: int) -> None:
        if level:
            nbytes = CHUNK if level == AUTO_LEVEL else TRY_BYTES
            chooser.encoded(nbytes, int(nbytes * RATIO), nbytes / encoder)
        length = int(CHUNK * RATIO) if level == AUTO_LEVEL else CHUNK
        chooser.wrote(length, length / disk)

    for i in range(chunks):
        if i >= 2:
            end(picks[i - 2])
        picks.append(chooser.pick())
    for level in picks[-2:]:
        end(level)
    chooser.synced(chunks * CHUNK, sync_seconds)
    assert [i for i, level in enumerate(picks) if level == TRY] in ([], [1])
    return [level == AUTO_LEVEL for level in picks]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_level_that_was_asked_for_is_kept(level: int) -> None:
    chooser = Chooser(Compression(level), ENCODERS)
    chooser.begin_save()
    assert not chooser.waits
    assert [chooser.pick() for _ in range(5)] == [level] * 5


def test_a_fast_disk_is_left_alone() -> None:
    chooser = Chooser(None, ENCODERS)
    assert chooser.waits
    for _ in range(5):
        assert not any(save(chooser, 30, 2e9, 0.9e9))


def test_a_slow_disk_is_helped_at_once() -> None:
    chooser = Chooser(None, ENCODERS)
    picks = save(chooser, 30, 150e6, 0.9e9)
    assert picks == [i >= 3 for i in range(30)]
    assert all(save(chooser, 30, 150e6, 0.9e9))


def test_busy_cores_are_left_alone() -> None:
    """The disk is as slow, but encoders do not get to run."""
    chooser = Chooser(None, ENCODERS)
    for _ in range(3):
        assert not any(save(chooser, 30, 150e6, 0.08e9))


def test_cores_that_become_busy_are_noticed_within_a_save() -> None:
    chooser = Chooser(None, ENCODERS)
    assert all(save(chooser, 30, 150e6, 0.9e9)[3:])
    picks = save(chooser, 60, 150e6, 0.02e9)
    assert sum(picks) <= 5
    assert not any(picks[-50:])


def test_one_slow_write_is_no_slow_disk() -> None:
    chooser = Chooser(None, ENCODERS)
    chooser.begin_save()
    assert [chooser.pick(), chooser.pick()] == [0, TRY]
    chooser.encoded(TRY_BYTES, int(TRY_BYTES * RATIO), TRY_BYTES / 0.9e9)
    chooser.wrote(CHUNK, CHUNK / 0.3e9)  # making the file is in it
    assert chooser.pick() == 0
    chooser.wrote(CHUNK, CHUNK / 3e9)
    chooser.wrote(CHUNK, CHUNK / 3e9)
    assert chooser.pick() == 0


def test_a_disk_that_changes_is_noticed_within_a_save() -> None:
    chooser = Chooser(None, ENCODERS)
    save(chooser, 30, 2e9, 0.9e9)
    assert all(save(chooser, 60, 150e6, 0.9e9)[8:])
    assert not any(save(chooser, 60, 2e9, 0.9e9)[30:])


def test_time_that_encoding_cannot_save_is_no_reason_for_it() -> None:
    """Writing is done at 300 MB/s, but most of the time goes into the sync, which comes after."""
    chooser = Chooser(None, ENCODERS)
    save(chooser, 30, 300e6, 0.9e9, sync_seconds=10.0)
    assert sum(save(chooser, 30, 300e6, 0.9e9, sync_seconds=10.0)) == 0


class SlowFile:
    """Takes 20 ms for every write."""

    def __init__(self, file: WritableFile) -> None:
        self._file = file
        self.sync, self.close = file.sync, file.close

    async def write(self, view: memoryview) -> None:
        await self._file.write(view)
        await asyncio.sleep(0.02 * view.nbytes / (64 << 10))


class SlowFileSystem(LocalFileSystem):
    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return SlowFile(await super().create(path, executor))


def test_the_first_save_learns_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsave.run.checkpointer.LocalFileSystem", SlowFileSystem)
    state = {"w": torch.randn(480_000) * 0.02}
    with Checkpointer(tmp_path, memory_limit=2 << 20, signals=()) as ckpt:  # chunks of 64 KiB
        for step in (1, 2):
            ckpt.save(step, state, block=True)
        first, second = ckpt.stats.reports
    assert first.chunks >= 25
    assert first.encoded_chunks >= first.chunks - 5
    assert second.encoded_chunks == second.chunks
