"""A disk that hangs raises no error: the watchdog says what a save waits for, and since when."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.pipeline.target import Target
from asyncsave.storage.place import Place
from tests.doubles.disks import AskingDisk
from tests.doubles.fake_device import FakeDevice, make_pipeline
from tests.support import SMALL_LIMIT, eventually, in_small_chunks

STATE = {"w": torch.arange(300_000.0)}


class HangingDisk(AskingDisk):
    """One kind of operation hangs until ``goes_on`` is set.

    Args:
        where: which one; nobody hangs where it is "".
        after: how many of them still go well.
    """

    def __init__(self, where: str, after: int = 0) -> None:
        super().__init__(self.hang)
        self.where, self.after = where, after
        self.goes_on, self.hanging = threading.Event(), threading.Event()

    def hang(self, what: str, path: Path) -> None:
        if what == "rename" and path.name.startswith("."):
            what = "prune"
        if what != self.where:
            return
        self.after -= 1
        if self.after < 0:
            self.hanging.set()
            assert self.goes_on.wait(20)


def warnings_of(caplog: pytest.LogCaptureFixture, word: str = "stood still") -> list[str]:
    return [each.getMessage() for each in caplog.records if word in each.getMessage()]


WORDS = {
    "create_directory": "creating files",
    "write": "writing at offset 262144",
    "sync": "syncing the data file",
    "rename": "syncing and committing",
    "prune": "removing older checkpoints",
}


@pytest.mark.parametrize("where", WORDS)
def test_a_stall_is_reported_with_where_and_since_when(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    disk = HangingDisk("")
    # small chunks: four are written, in one go, before those that hang
    state = in_small_chunks()
    options: dict[str, Any] = {"compression": "off", "keep_last": 1, "memory_limit": SMALL_LIMIT}
    options["reuse"] = "off"
    with Checkpointer(disk.at(tmp_path), stall_warning_seconds=0.2, **options) as ckpt:
        ckpt.save(1, state, block=True)
        disk.where, disk.after = where, where == "write"
        handle = ckpt.save(2, state)
        assert handle is not None
        assert disk.hanging.wait(20)
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        assert not ckpt.wait(0.05), "timeouts are kept while the disk hangs"
        # a machine that is busy can make other places stand still for a moment, too
        assert eventually(lambda: len(warnings_of(caplog, WORDS[where])) >= 3)
        texts = warnings_of(caplog, WORDS[where])
        disk.goes_on.set()
        handle.result(20)
        for i, text in enumerate(texts):
            assert str(tmp_path / "step-000000002") in text
            found = re.search(r"for (\d\.\d) s, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", text)
            assert found
            assert float(found[1]) >= 0.2 * 2**i, "once, and again when that has doubled"
        assert {each.levelno for each in caplog.records} == {logging.WARNING}
        assert {each.name for each in caplog.records} == {"asyncsave"}


def test_each_stall_is_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = HangingDisk("write")
    with Checkpointer(disk.at(tmp_path), stall_warning_seconds=0.1, compression="off") as ckpt:
        ckpt.save(1, STATE)
        assert eventually(lambda: len(warnings_of(caplog, "writing at offset 0")) >= 2)
        disk.where = "sync"
        disk.hanging.clear()
        wrote, disk.goes_on = disk.goes_on, threading.Event()
        wrote.set()
        assert disk.hanging.wait(20)
        caplog.clear()
        assert eventually(lambda: len(warnings_of(caplog, "syncing the data file")) >= 1)
        waited = re.search(r"for (\d\.\d) s", warnings_of(caplog, "syncing the data file")[0])
        assert waited
        assert float(waited[1]) < 0.3, "counted from its own beginning: the write hung for longer"
        disk.goes_on.set()


def test_a_device_that_hangs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device, stall_warning_seconds=0.1)
    handle = pipeline.save({"model": torch.nn.Linear(4, 4)}, Target(Place(tmp_path / "a")), 0.0)
    assert eventually(lambda: len(warnings_of(caplog, "copying from the device")) >= 1)
    device.finish()
    handle.result(20)
    pipeline.close()


def test_none_turns_it_off_and_impossible_times_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, later, monotonic = HangingDisk("write"), 0.0, time.monotonic
    with Checkpointer(disk.at(tmp_path), stall_warning_seconds=None) as ckpt:
        ckpt.save(1, STATE)
        assert disk.hanging.wait(20)
        assert not ckpt.wait(0.1)
        with monkeypatch.context() as patch:  # as if it had hung for a day
            patch.setattr(time, "monotonic", lambda: monotonic() + later)
            later = 86_400.0
            disk.goes_on.set()
            ckpt.wait()
    assert warnings_of(caplog) == []
    for seconds in (0, -1, float("inf"), float("nan"), "60", True):
        with pytest.raises(asyncsave.ConfigError, match="stall_warning_seconds"):
            Checkpointer(tmp_path, stall_warning_seconds=seconds)  # type: ignore[arg-type]
    Checkpointer(tmp_path).close()
