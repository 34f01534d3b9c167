"""compression="auto": what is chosen, given what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncsave import Checkpointer, Compression
from asyncsave.pipeline.choose import PROBE_BYTES, Chooser, Pick
from tests.doubles.disks import SlowDisk

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
    picks: list[Pick] = []

    def end(pick: Pick) -> None:
        if pick is not Pick.RAW:
            nbytes = CHUNK if pick is Pick.ENCODE else PROBE_BYTES
            chooser.encoded(nbytes, int(nbytes * RATIO), nbytes / encoder)
        length = int(CHUNK * RATIO) if pick is Pick.ENCODE else CHUNK
        chooser.wrote(length, length / disk)

    for i in range(chunks):
        if i >= 2:
            end(picks[i - 2])
        picks.append(chooser.pick())
    for pick in picks[-2:]:
        end(pick)
    chooser.synced(chunks * CHUNK, sync_seconds)
    assert [i for i, pick in enumerate(picks) if pick is Pick.PROBE] in ([], [1])
    return [pick is Pick.ENCODE for pick in picks]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_level_that_was_asked_for_is_kept(level: int) -> None:
    chooser = Chooser(Compression(level), ENCODERS)
    chooser.begin_save()
    assert not chooser.adapts
    assert [chooser.pick() for _ in range(5)] == [Pick.ENCODE if level else Pick.RAW] * 5


def test_a_fast_disk_is_left_alone() -> None:
    chooser = Chooser(None, ENCODERS)
    assert chooser.adapts
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
    assert [chooser.pick(), chooser.pick()] == [Pick.RAW, Pick.PROBE]
    chooser.encoded(PROBE_BYTES, int(PROBE_BYTES * RATIO), PROBE_BYTES / 0.9e9)
    chooser.wrote(CHUNK, CHUNK / 0.3e9)  # making the file is in it
    assert chooser.pick() is Pick.RAW
    chooser.wrote(CHUNK, CHUNK / 3e9)
    chooser.wrote(CHUNK, CHUNK / 3e9)
    assert chooser.pick() is Pick.RAW


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


def test_the_first_save_learns_while_it_runs(tmp_path: Path) -> None:
    disk = SlowDisk(0.02 / (64 << 10))
    state = {"w": torch.randn(480_000) * 0.02}
    options: Any = {"memory_limit": 2 << 20, "reuse": "off", "signals": ()}  # chunks of 64 KiB
    with Checkpointer(disk.at(tmp_path), **options) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state, block=True)
        first, second = ckpt.stats.reports
    assert first.chunks >= 25
    assert first.encoded_chunks >= first.chunks - 5
    assert second.encoded_chunks == second.chunks
