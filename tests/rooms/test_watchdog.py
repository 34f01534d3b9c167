"""A disk that hangs raises no error: the watchdog says what a save waits for, and since when."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.pipeline.save import Target
from asyncsave.storage.filesystem import LocalFileSystem, WritableFile
from tests.doubles.fake_device import FakeDevice, make_pipeline
from tests.support import eventually

STATE = {"w": torch.arange(300_000.0)}


class HangingFile:
    def __init__(self, file: WritableFile, filesystem: HangingFileSystem, executor: Executor):
        self._file, self._filesystem, self._executor = file, filesystem, executor

    async def _hang(self, where: str) -> None:
        call = asyncio.get_running_loop().run_in_executor
        await call(self._executor, self._filesystem.hang, where)

    async def write(self, view: memoryview) -> None:
        await self._hang("write")
        await self._file.write(view)

    async def sync(self) -> None:
        await self._hang("sync")
        await self._file.sync()

    async def close(self) -> None:
        await self._file.close()


class HangingFileSystem(LocalFileSystem):
    """One kind of operation hangs until ``goes_on`` is set."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.goes_on, self.hanging = threading.Event(), threading.Event()

    def hang(self, where: str) -> None:
        if where == self.where:
            self.hanging.set()
            assert self.goes_on.wait(20)

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return HangingFile(await super().create(path, executor), self, executor)

    def create_directory(self, path: Path) -> None:
        self.hang("create")
        super().create_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.hang("prune" if target.name.startswith(".") else "rename")
        super().rename(source, target)


def warnings_of(caplog: pytest.LogCaptureFixture, word: str = "stood still") -> list[str]:
    return [each.getMessage() for each in caplog.records if word in each.getMessage()]


WORDS = {
    "create": "creating files",
    "write": "writing at offset 262144",
    "sync": "syncing the data file",
    "rename": "syncing and committing",
    "prune": "removing older checkpoints",
}


@pytest.mark.parametrize("where", WORDS)
def test_a_stall_is_reported_with_where_and_since_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    filesystem = HangingFileSystem("")
    monkeypatch.setattr("asyncsave.run.checkpointer.LocalFileSystem", lambda: filesystem)
    # small chunks: four are written, in one go, before those that hang
    monkeypatch.setattr("asyncsave.pipeline.budget.CHUNK_BYTES", 64 << 10)
    options: dict[str, Any] = {"compression": "off", "keep_last": 1}
    with Checkpointer(tmp_path, stall_warning_seconds=0.2, **options) as ckpt:
        ckpt.save(1, STATE, block=True)
        filesystem.where = where
        if where == "write":
            writes = iter(range(100))
            hang = filesystem.hang
            monkeypatch.setattr(
                filesystem, "hang", lambda w: hang(w) if w != "write" or next(writes) else None
            )
        handle = ckpt.save(2, STATE)
        assert handle is not None
        assert filesystem.hanging.wait(20)
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        assert not ckpt.wait(0.05), "timeouts are kept while the disk hangs"
        # a machine that is busy can make other places stand still for a moment, too
        assert eventually(lambda: len(warnings_of(caplog, WORDS[where])) >= 3)
        texts = warnings_of(caplog, WORDS[where])
        filesystem.goes_on.set()
        handle.result(20)
        for i, text in enumerate(texts):
            assert str(tmp_path / "step-000000002") in text
            found = re.search(r"for (\d\.\d) s, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", text)
            assert found
            assert float(found[1]) >= 0.2 * 2**i, "once, and again when that has doubled"
        assert {each.levelno for each in caplog.records} == {logging.WARNING}
        assert {each.name for each in caplog.records} == {"asyncsave"}


def test_each_stall_is_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem = HangingFileSystem("write")
    monkeypatch.setattr("asyncsave.run.checkpointer.LocalFileSystem", lambda: filesystem)
    with Checkpointer(tmp_path, stall_warning_seconds=0.1, compression="off") as ckpt:
        ckpt.save(1, STATE)
        assert eventually(lambda: len(warnings_of(caplog, "writing at offset 0")) >= 2)
        filesystem.where = "sync"
        filesystem.hanging.clear()
        wrote, filesystem.goes_on = filesystem.goes_on, threading.Event()
        wrote.set()
        assert filesystem.hanging.wait(20)
        caplog.clear()
        assert eventually(lambda: len(warnings_of(caplog, "syncing the data file")) >= 1)
        waited = re.search(r"for (\d\.\d) s", warnings_of(caplog, "syncing the data file")[0])
        assert waited
        assert float(waited[1]) < 0.3, "counted from its own beginning: the write hung for longer"
        filesystem.goes_on.set()


def test_a_device_that_hangs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device, stall_warning_seconds=0.1)
    handle = pipeline.save({"model": torch.nn.Linear(4, 4)}, Target(tmp_path / "a"), 0.0)
    assert eventually(lambda: len(warnings_of(caplog, "copying from the device")) >= 1)
    device.finish()
    handle.result(20)
    pipeline.close()


def test_none_turns_it_off_and_impossible_times_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem = HangingFileSystem("write")
    with monkeypatch.context() as patch:
        patch.setattr("asyncsave.run.checkpointer.LocalFileSystem", lambda: filesystem)
        patch.setattr(
            "asyncsave.pipeline.watchdog.Watchdog._look", lambda _: pytest.fail("it looks")
        )
        with Checkpointer(tmp_path, stall_warning_seconds=None) as ckpt:
            ckpt.save(1, STATE)
            assert filesystem.hanging.wait(20)
            assert not ckpt.wait(0.1)
            filesystem.goes_on.set()
    assert warnings_of(caplog) == []
    for seconds in (0, -1, float("inf"), float("nan"), "60", True):
        with pytest.raises(asyncsave.ConfigError, match="stall_warning_seconds"):
            Checkpointer(tmp_path, stall_warning_seconds=seconds)  # type: ignore[arg-type]
    Checkpointer(tmp_path).close()
