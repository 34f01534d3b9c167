"""Saver: any path, warm memory, and the promises of a Checkpointer where they apply."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Saver
from asyncsave.pages import PAGE_BYTES
from tests import children
from tests.doubles.disks import AskingDisk, NoExchangeDisk
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import assert_same, at_once, eventually


def state_of(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {"n": number, "w": torch.randn(300_000, generator=generator), "b": torch.ones(7)}


def full_disk() -> AskingDisk:
    """Return a disk on which there is no room for data."""

    def ask(what: str, path: Path) -> None:
        if what == "create":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return AskingDisk(ask)


def test_saves_to_any_path_and_loads_again(tmp_path: Path) -> None:
    with Saver(compression=1) as saver:
        for number in range(5):
            handle = saver.save(
                state_of(number), tmp_path / "deep" / f"epoch {number}", metadata={"n": number}
            )
        report = handle.result()
    assert report.path == tmp_path / "deep" / "epoch 4"
    for number in range(5):
        path = tmp_path / "deep" / f"epoch {number}"
        assert_same(asyncsave.load(path), state_of(number))
        assert json.loads((path / "checkpoint.json").read_text())["metadata"] == {"n": number}
        asyncsave.verify(path)


def test_step_and_metrics_are_stored(tmp_path: Path) -> None:
    with Saver() as saver:
        saver.save(state_of(1), tmp_path / "a", step=7, metrics={"loss": 0.5}).result()
    [info] = asyncsave.checkpoints(tmp_path / "a")
    assert (info.step, info.metrics) == (7, {"loss": 0.5})
    into = state_of(2)
    assert asyncsave.restore(tmp_path / "a", into) == 7
    assert_same(into, state_of(1))


def test_a_second_save_takes_no_memory_and_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = mmap.mmap

    def taking(number: int, length: int, **options: Any) -> mmap.mmap:
        taken.append(length)
        return take(number, length, **options)

    monkeypatch.setattr(mmap, "mmap", taking)
    with Saver(compression=1) as saver:
        first = saver.save(state_of(1), tmp_path / "a").result()
        assert sum(taken) >= 1_200_000, "slots are taken there"
        taken.clear()
        threads = {thread.ident for thread in threading.enumerate()}
        for number in range(2, 6):
            report = saver.save(state_of(number), tmp_path / f"{number}").result()
            assert report.peak_memory_bytes == first.peak_memory_bytes
            assert {thread.ident for thread in threading.enumerate()} == threads
        assert taken == []


def test_prewarm_takes_the_memory(tmp_path: Path) -> None:
    state = {"w": torch.randn(8 << 20)}
    with Saver(compression=0) as saver:
        before = resident()
        saver.prewarm(state)
        taken = resident() - before
        assert taken >= 30 << 20
        report = saver.save(state, tmp_path / "a").result()
        assert report.peak_memory_bytes == 32 << 20
        assert resident() - before <= taken + (8 << 20), "and the save takes no other"
    assert_same(asyncsave.load(tmp_path / "a"), state)


def resident() -> int:
    """Return how many bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_what_is_there_is_not_replaced_but_on_demand(tmp_path: Path) -> None:
    with Saver() as saver:
        saver.save(state_of(1), tmp_path / "a")
        with pytest.raises(asyncsave.CheckpointExistsError, match="overwrite=True"):
            saver.save(state_of(2), tmp_path / "a")  # though the first is still being written
        saver.save(state_of(3), tmp_path / "a", overwrite=True).result()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("precious")
        with pytest.raises(asyncsave.CheckpointExistsError, match="not a checkpoint"):
            saver.save(state_of(2), tmp_path / "mine", overwrite=True)
    assert_same(asyncsave.load(tmp_path / "a"), state_of(3))
    assert (tmp_path / "mine" / "file").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_be_meanwhile_and_is_no_checkpoint_stays(
    tmp_path: Path, overwrite: bool
) -> None:
    path = tmp_path / "a"

    def ask(what: str, name: Path) -> None:
        if what == "write_file" and name.name == "checkpoint.json":
            path.mkdir()
            (path / "thesis").write_text("precious")

    handle = asyncsave.save(state_of(1), AskingDisk(ask).at(path), overwrite=overwrite)
    assert isinstance(handle.exception(), asyncsave.CheckpointExistsError)
    assert os.listdir(tmp_path) == ["a"]
    assert (path / "thesis").read_text() == "precious"


def test_a_checkpoint_that_comes_to_be_meanwhile_is_overwritten_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def ask(what: str, name: Path) -> None:
        if what == "write_file" and name.name == "checkpoint.json":
            asyncsave.save(state_of(2), path).result()

    asyncsave.save(state_of(1), AskingDisk(ask).at(path), overwrite=True).result()
    assert_same(asyncsave.load(path), state_of(1))
    assert os.listdir(tmp_path) == ["a"]


def test_what_was_to_be_replaced_comes_back_over_an_empty_directory_alone(tmp_path: Path) -> None:
    """Killed where there is no atomic swap, between the two renames."""
    path, old = tmp_path / "best", tmp_path / ".best.0123456789abcdef.replaced"
    asyncsave.save(state_of(1), path).result()
    path.rename(old)
    path.mkdir()  # as scripts do
    with pytest.raises(asyncsave.StateError):
        asyncsave.save({"x": object()}, path, overwrite=True)
    assert_same(asyncsave.load(path), state_of(1))
    path.rename(old)
    path.mkdir()
    (path / "thesis").write_text("precious")
    with pytest.raises(asyncsave.CheckpointExistsError):
        asyncsave.save(state_of(2), path, overwrite=True)
    assert_same(asyncsave.load(old), state_of(1))


def test_what_was_replaced_and_cannot_be_removed_does_not_come_back(tmp_path: Path) -> None:
    full = True

    def ask(what: str, path: Path) -> None:
        if full and what == "remove_tree":
            raise OSError(errno.EBUSY, "busy")

    disk = AskingDisk(ask, NoExchangeDisk())
    with asyncsave.Checkpointer(disk.at(tmp_path / "run"), keep_last=1) as run:
        run.save(1, state_of(1), block=True)
        run.save(1, state_of(2), block=True)
        run.save(2, state_of(3), block=True)
        assert run.steps() == [2]
    full = False
    with asyncsave.Checkpointer(tmp_path / "run", keep_last=1) as run:
        assert run.steps() == [2]
    assert os.listdir(tmp_path / "run") == ["step-000000002"]


def test_half_a_checkpoint_does_not_come_back(tmp_path: Path) -> None:
    half = tmp_path / ".step-000000005.0123456789abcdef.replaced"
    half.mkdir()
    (half / "rank-00000.json").write_text("{}")
    with asyncsave.Checkpointer(tmp_path) as run:
        assert run.steps() == []
    assert not half.exists()


@pytest.mark.parametrize("when", ["removed", "held"])
def test_a_sweep_that_takes_what_is_not_locked_yet_does_no_harm(tmp_path: Path, when: str) -> None:
    path, sweeps, held = tmp_path / "a", 0, threading.Event()
    others = []

    def other(ask: Callable[[str, Path], object]) -> None:
        with pytest.raises(asyncsave.StateError):
            asyncsave.save({"x": object()}, AskingDisk(ask).at(path), overwrite=True)

    def hold(what: str, name: Path) -> None:
        if what == "remove_tree" and when == "held":
            held.set()
            time.sleep(0.2)

    def ask(what: str, name: Path) -> None:
        nonlocal sweeps
        if what == "lock" and name.name.startswith(".a.") and not sweeps:
            sweeps += 1
            others.append(threading.Thread(target=other, args=(hold,)))
            others[0].start()
            if when == "held":
                assert held.wait(10)
            else:
                others[0].join()

    asyncsave.save(state_of(1), AskingDisk(ask).at(path), overwrite=True).result()
    others[0].join()
    assert sweeps == 1
    assert_same(asyncsave.load(path), state_of(1))
    assert os.listdir(tmp_path) == ["a"]


def test_a_second_save_beside_the_first_syncs_nothing_in_the_call(tmp_path: Path) -> None:
    synced = []

    def ask(what: str, path: Path) -> None:
        if what == "sync_directory" and threading.current_thread() is threading.main_thread():
            synced.append(path)

    disk = AskingDisk(ask)
    with Saver() as saver:
        saver.save(state_of(1), disk.at(tmp_path / "deep" / "a")).result()
        assert tmp_path in synced
        synced.clear()
        saver.save(state_of(1), disk.at(tmp_path / "deep" / "b")).result()
        assert not synced
        shutil.rmtree(tmp_path / "deep")
        saver.save(state_of(1), disk.at(tmp_path / "deep" / "c")).result()
        assert tmp_path in synced


class Unruly(logging.Handler):
    """Raises, as handlers should not."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("what a user's handler raises")


def test_logging_that_raises_ends_no_save_and_no_saver(tmp_path: Path) -> None:
    log, unruly = logging.getLogger("asyncsave"), Unruly()
    level = log.level
    log.addHandler(unruly)
    log.setLevel(logging.INFO)
    try:
        with Saver() as saver:
            first = saver.save(state_of(1), tmp_path / "a")
            first.add_done_callback(lambda _: 1 / 0)
            assert first.exception() is None
            saver.save(state_of(2), tmp_path / "b").result()
    finally:
        log.removeHandler(unruly)
        log.setLevel(level)
    assert_same(asyncsave.load(tmp_path / "a"), state_of(1))
    assert_same(asyncsave.load(tmp_path / "b"), state_of(2))


def test_logging_that_raises_while_older_ones_are_pruned_fails_no_save(tmp_path: Path) -> None:
    def ask(what: str, path: Path) -> None:
        if what == "rename" and path.name.startswith(".step"):
            raise OSError(errno.EBUSY, "busy")

    log, unruly = logging.getLogger("asyncsave"), Unruly()
    log.addHandler(unruly)
    try:
        with asyncsave.Checkpointer(AskingDisk(ask).at(tmp_path), keep_last=1) as run:
            run.save(1, state_of(1), block=True)
            run.save(2, state_of(2), block=True)
            assert run.stats.saves == 2
    finally:
        log.removeHandler(unruly)
    assert_same(asyncsave.load(tmp_path), state_of(2))


def test_closing_again_from_any_thread_is_fine(tmp_path: Path) -> None:
    """Also from one that has the number which the event loop's thread had."""
    for _ in range(3):
        saver = Saver()
        saver.close()
        assert at_once(8, saver.close) == [None] * 8


SCARCE = """
import gc, re, resource, sys, torch, asyncsave

def taken():
    return int(re.search(r"VmSize:\\s+([0-9]+)", open("/proc/self/status").read())[1]) << 10

little, much = {"x": torch.zeros(17 << 18)}, {"x": torch.zeros(33 << 18)}
with asyncsave.Saver(compression="off", memory_limit="64MiB") as saver:
    saver.save(little, sys.argv[1]).result()
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (taken() + (24 << 20),) * 2)
    saver.prewarm(much)  # fits only where what was there has been given back
"""


def test_to_grow_what_was_there_is_given_back_first(tmp_path: Path) -> None:
    ended = children.run(SCARCE, tmp_path / "a")
    assert ended.returncode == 0, ended.stderr


def test_names_of_steps_are_guarded(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path / "run") as run:
        run.save(1, state_of(1), block=True)
    with Saver() as saver:
        with pytest.raises(asyncsave.ConfigError, match="Checkpointer alone"):
            saver.save(state_of(2), tmp_path / "run" / "step-000000002")
        with pytest.raises(asyncsave.ConfigError, match="name of step 5"):
            saver.save(state_of(2), tmp_path / "step-000000005", step=4)
        with pytest.raises(asyncsave.ConfigError, match="looks like the name of step 5"):
            saver.save(state_of(2), tmp_path / "step-0000000005")
        saver.save(state_of(2), tmp_path / "step-000000005", step=5)


def test_a_save_is_timed_from_its_call(tmp_path: Path) -> None:
    disk = AskingDisk(lambda what, _: what != "create_directory" or time.sleep(0.1))
    # the parent is made, and more, before there is anything to save
    path = tmp_path / "deep" / "a"
    assert asyncsave.save(state_of(1), disk.at(path)).result().blocked_seconds >= 0.1
    with Saver() as saver:
        path = tmp_path / "deeper" / "b"
        assert saver.save(state_of(1), disk.at(path)).result().blocked_seconds >= 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1},
        {"step": "7"},
        {"metrics": {"loss": "low"}},
        {"metadata": {1: 2}},
        {"path": 7},
        {"path": "s3://bucket/a"},
        {"state": {"f": print}},
    ],
)
def test_a_mistake_is_said_at_once_and_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    with Saver() as saver:
        with pytest.raises((asyncsave.ConfigError, asyncsave.StateError)):
            saver.save(**{"state": state_of(1), "path": tmp_path / "a", **arguments})
        assert list(tmp_path.iterdir()) == []
        saver.save(state_of(2), tmp_path / "b").result()
    assert_same(asyncsave.load(tmp_path / "b"), state_of(2))


def test_an_error_in_the_background_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    faults = Faults(3, 28)  # the first three are before the save begins
    place = FaultDisk(faults).at(tmp_path)
    with Saver() as saver:
        faults.on = False
        saver.save(state_of(1), place / "a").result()
        assert faults.operations == []
        faults.on = True
        handle = saver.save(state_of(2), place / "b")
        assert eventually(handle.done, 30)
        faults.on = False
        with pytest.raises(asyncsave.DiskFullError):
            saver.save(state_of(3), place / "c")
        saver.save(state_of(3), place / "c")  # nothing was begun, so it can be called again
        assert saver.wait()
        assert (saver.stats.saves, saver.stats.failures) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    assert_same(asyncsave.load(tmp_path / "c"), state_of(3))


def test_the_error_of_the_last_save_is_raised_by_close(tmp_path: Path) -> None:
    saver = Saver()
    saver.save(state_of(1), full_disk().at(tmp_path / "a"))
    with pytest.raises(asyncsave.DiskFullError):
        saver.close()
    saver.close()
    with pytest.raises(asyncsave.ClosedError, match="Saver is closed"):
        saver.save(state_of(1), tmp_path / "b")


def test_in_with_the_users_own_exception_comes_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with Saver() as saver:
            saver.save(state_of(1), full_disk().at(tmp_path / "a"))
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        work()
    assert any("a save had failed as well" in note for note in caught.value.__notes__)
    assert "a save failed" in caplog.text


def test_one_that_is_dropped_finishes_its_save_and_warns(tmp_path: Path) -> None:
    savers = [Saver()]
    handle = savers[0].save(state_of(1), tmp_path / "a")
    dead = weakref.ref(savers[0])
    with pytest.warns(ResourceWarning, match="Saver was dropped"):
        savers.clear()
    assert dead() is None
    handle.result()
    assert_same(asyncsave.load(tmp_path / "a"), state_of(1))


def test_threads_take_turns(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    with Saver(memory_limit="16MB") as saver:

        def work(number: int) -> None:
            try:
                for i in range(5):
                    saver.save(state_of(number), tmp_path / f"{number}-{i}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for number in range(4):
        for i in range(5):
            assert_same(asyncsave.load(tmp_path / f"{number}-{i}"), state_of(number))


def test_a_done_callback_must_not_use_it(tmp_path: Path) -> None:
    refused: list[BaseException] = []
    with Saver() as saver:

        def again(_: Any) -> None:
            try:
                saver.save(state_of(2), tmp_path / "b")
            except asyncsave.BusyError as error:
                refused.append(error)

        saver.save(state_of(1), tmp_path / "a").add_done_callback(again)
        saver.wait()
    assert len(refused) == 1
    assert "its Saver" in str(refused[0])
