"""Checkpointer: when it saves, what it keeps, how it stops, and what it says."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.storage.place import PathLike, Place
from tests import children
from tests.doubles.disks import AskingDisk, GatedDisk, NoExchangeDisk
from tests.support import assert_same, eventually

STATE = {"w": torch.arange(1000.0), "n": 1}


def make(directory: PathLike, **options: Any) -> Checkpointer:
    return Checkpointer(directory, **{"durable": False, **options})


def resident() -> int:
    """Return how many bytes of memory this process has."""
    return int(psutil.Process().memory_info().rss)


@pytest.fixture
def gated() -> GatedDisk:
    return GatedDisk()


# -- cadence --------------------------------------------------------------------------------------


def test_every_steps(tmp_path: Path) -> None:
    with make(tmp_path, every_steps=3) as ckpt:
        handles = {step: ckpt.step(step, STATE) for step in range(1, 10)}
        ckpt.wait()
        assert ckpt.steps() == [3, 6, 9]
        assert ckpt.latest_step() == 9
        assert [step for step, handle in handles.items() if handle is not None] == [3, 6, 9]


def test_every_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with make(tmp_path, every_seconds=10) as ckpt:
        for step in range(1, 30):
            now += 4.0
            ckpt.step(step, STATE)
        ckpt.wait()
        assert ckpt.steps() == [3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_without_a_cadence_only_save_saves(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        with pytest.raises(asyncsave.ConfigError, match=r"every_steps= or every_seconds="):
            ckpt.step(1, STATE)
        assert ckpt.steps() == []
        assert ckpt.latest_step() is None
        handle = ckpt.save(7, STATE, block=True)
        assert handle is not None
        assert handle.done()
        assert ckpt.steps() == [7]


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 0},
        {"every_steps": 1.5},
        {"every_seconds": -1},
        {"keep_last": 0},
        {"keep_every": "5"},
        {"keep_best": ("loss", "lowest")},
        {"keep_best": "loss"},
        {"keep_best": ("loss",)},
        {"keep_best": ("loss", "min", 1, 1)},
        {"existing": "remove"},
        {"on_error": "ignore"},
        {"memory_limit": "2 apples"},
        {"memory_limit": "0GB"},
        {"keep_best": ("loss", "min", 0)},
        {"compression": 23},
        {"compression": "fast"},
        {"compression": True},
        {"memory_limit": 0},
        {"memory_limit": "all"},
        {"on_busy": "drop"},
        {"signals": ["TERM"]},
        {"signals": [signal.SIGKILL]},
    ],
    ids=str,
)
def test_impossible_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(asyncsave.ConfigError, match=next(iter(options)).split("_")[0]):
        Checkpointer(tmp_path, **options)
    Checkpointer(tmp_path, durable=False).close()  # and the directory is free


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, 10**18])
def test_impossible_steps(tmp_path: Path, step: Any) -> None:
    with make(tmp_path) as ckpt, pytest.raises(asyncsave.ConfigError, match="step"):
        ckpt.save(step, STATE)


# -- the handle ----------------------------------------------------------------------------------


def test_handle_and_report(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path)) as ckpt:
        handle = ckpt.save(5, STATE, metrics={"loss": 0.5}, metadata={"note": ["a", 1]})
        assert handle is not None
        called = []
        handle.add_done_callback(called.append)
        assert (handle.step, handle.path) == (5, tmp_path / "step-000000005")
        assert handle.wait_staged(0)
        assert not handle.done()
        assert not ckpt.wait(0.01)
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        assert "running" in repr(handle)
        gated.gate.set()
        report = handle.result(20)
        assert "durable" in repr(handle)
        assert eventually(lambda: called == [handle])
        assert report.step == 5
        assert report.path == handle.path
        assert report.raw_bytes == 4000
        assert report.stored_bytes == sum(file.stat().st_size for file in handle.path.iterdir())
        assert report.ratio == report.raw_bytes / report.stored_bytes
        assert 0 < report.blocked_seconds <= report.durable_seconds
        assert 0 < report.staged_seconds <= report.durable_seconds
        assert report.fence_seconds == 0
        assert report.chunks == 1
        assert report.tensors == 1
        assert ckpt.wait(0)
        assert ckpt.stats.saves == 1
        assert ckpt.stats.reports == [report]
        record = (handle.path / "checkpoint.json").read_text()
        assert '"note":["a",1]' in record
        assert '"loss":0.5' in record


def test_a_handle_can_be_awaited(tmp_path: Path) -> None:
    async def main() -> asyncsave.SaveReport:
        return await asyncsave.save(STATE, tmp_path / "a")

    assert asyncio.run(main()).raw_bytes == 4000


def test_awaiting_raises_what_failed(tmp_path: Path, gated: GatedDisk) -> None:
    (tmp_path / "a").mkdir()

    async def main() -> None:
        handle = asyncsave.save(STATE, gated.at(tmp_path / "a" / "b"))
        assert eventually(lambda: len(list((tmp_path / "a").glob(".*/*.data"))) == 1)
        os.rename(tmp_path / "a", tmp_path / "gone")
        gated.gate.set()
        await handle

    with pytest.raises(asyncsave.WriteError):
        asyncio.run(main())


def test_a_callback_that_raises_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(tmp_path) as ckpt:
        handle = ckpt.save(1, STATE)
        assert handle is not None
        handle.add_done_callback(lambda _: 1 / 0)
        handle.result()
        assert eventually(lambda: "ZeroDivisionError" in caplog.text)


def test_metadata_must_be_plain(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        with pytest.raises(asyncsave.StateError, match="metadata"):
            ckpt.save(1, STATE, metadata={"x": object()})
        with pytest.raises(asyncsave.ConfigError, match="'loss'"):
            ckpt.save(1, STATE, metrics={"loss": "low"})  # type: ignore[dict-item]


# -- busy -----------------------------------------------------------------------------------------


def test_busy_skip(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path), every_steps=1, on_busy="skip") as ckpt:
        assert ckpt.step(1, STATE) is not None
        assert ckpt.step(2, STATE) is None
        assert ckpt.stats.skipped == 1
        gated.gate.set()
        ckpt.wait()
        assert ckpt.step(3, STATE) is not None
        ckpt.wait()
        assert ckpt.steps() == [1, 3]


def test_busy_error(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path), every_steps=1, on_busy="error") as ckpt:
        ckpt.step(1, STATE)
        with pytest.raises(asyncsave.BusyError, match="step 1 is still being written"):
            ckpt.step(2, STATE)
        gated.gate.set()
        ckpt.wait()
        assert ckpt.steps() == [1]


def test_busy_wait_is_counted_as_blocked(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path), every_steps=1) as ckpt:
        ckpt.step(1, STATE)
        threading.Timer(0.2, gated.gate.set).start()
        handle = ckpt.step(2, STATE)
        assert handle is not None
        assert handle.result().blocked_seconds > 0.15
        assert ckpt.steps() == [1, 2]


# -- retention ------------------------------------------------------------------------------------


def kept(directory: Path, **options: Any) -> list[int]:
    losses = [5.0, 1.0, 4.0, 2.0, float("nan"), 3.0, 6.0, 7.0]
    with make(directory, every_steps=10, **options) as ckpt:
        for i, loss in enumerate(losses):
            ckpt.step(10 * (i + 1), STATE, metrics={"loss": loss})
        ckpt.wait()
        names = sorted(path.name for path in directory.iterdir())
        assert names == [f"step-{step:09d}" for step in ckpt.steps()], "nothing half-removed"
        return ckpt.steps()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [10, 20, 30, 40, 50, 60, 70, 80]),
        ({"keep_last": 1}, [80]),
        ({"keep_last": 3}, [60, 70, 80]),
        ({"keep_every": 30}, [30, 60, 80]),
        ({"keep_last": 2, "keep_every": 40}, [40, 70, 80]),
        ({"keep_best": ("loss", "min")}, [20, 80]),
        ({"keep_best": ("loss", "max", 2)}, [70, 80]),
        ({"keep_best": ("loss", "min", 2), "keep_last": 1}, [20, 40, 80]),
        ({"keep_best": ("accuracy", "max")}, [80]),
    ],
    ids=str,
)
def test_retention(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    assert kept(tmp_path, **options) == expected


def test_metrics_of_earlier_runs_count(tmp_path: Path) -> None:
    with make(tmp_path, keep_best=("score", "max")) as ckpt:
        ckpt.save(1, STATE, metrics={"score": 9})
        ckpt.save(2, STATE, metrics={"score": 3})
    with make(tmp_path, keep_best=("score", "max")) as ckpt:
        ckpt.load()
        ckpt.save(3, STATE, metrics={"score": 5}, block=True)
        assert ckpt.steps() == [1, 3]


# -- owning the directory ---------------------------------------------------------------------


def test_a_second_checkpointer_is_refused(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        ckpt.save(1, STATE, block=True)
        with pytest.raises(asyncsave.BusyError, match="another Checkpointer"):
            make(tmp_path)
        ckpt.save(2, STATE, block=True)
    with make(tmp_path) as ckpt:
        assert ckpt.steps() == [1, 2]
    assert asyncsave.verify(tmp_path).chunks == 2


OWN = """
import sys, asyncsave
try:
    asyncsave.Checkpointer(sys.argv[1], durable=False).close()
    print("owned")
except asyncsave.BusyError:
    print("busy")
"""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    def another_process() -> str:
        return children.run(OWN, tmp_path).stdout.strip()

    with make(tmp_path):
        assert another_process() == "busy"
    assert another_process() == "owned"


def test_leftovers_of_the_dead_are_swept_and_nothing_else(tmp_path: Path) -> None:
    ours = tmp_path / ".step-000000007.0123456789abcdef"
    ours.mkdir()
    (ours / "rank-00000.data").write_bytes(b"half")
    others = [
        tmp_path / ".step-000000007.tmp",
        tmp_path / ".git",
        tmp_path / "step-7",
        tmp_path / ".model.0123456789abcdef",
    ]
    for path in others:
        path.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / ".step-000000008.0123456789abcdef"
    link.symlink_to(outside)
    alive = tmp_path / ".step-000000009.0123456789abcdef"
    alive.mkdir()
    lock = Place(alive).lock()
    with make(tmp_path) as ckpt:
        assert not ours.exists()
        assert all(
            path.exists() for path in [*others, outside, link, alive, tmp_path / "notes.txt"]
        )
        assert ckpt.steps() == []
        assert ckpt.restore({}) is None
    assert lock is not None, "or nothing was swept"
    lock.release()


def test_directories_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(asyncsave.WriteError, match="a part of the path is a file") as caught:
        make(tmp_path / "file" / "run")
    assert caught.value.errno is not None
    with pytest.raises(asyncsave.WriteError, match="/proc/nothing"):
        make(Path("/proc/nothing"))
    with pytest.raises(asyncsave.WriteError, match="/proc/nothing"):
        asyncsave.save(STATE, "/proc/nothing/here")


# -- signals, closing ------------------------------------------------------------------------


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    chained = []

    def handler(number: int, frame: Any) -> None:
        chained.append(number)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        with make(tmp_path, every_steps=100) as ckpt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert chained == [signal.SIGTERM], "nothing is handled before the first step"
            chained.clear()
            ckpt.step(1, STATE)
            assert not ckpt.should_stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert chained == [signal.SIGTERM], "a handler of the program's own is called, too"
            assert not ckpt.should_stop, "not before the state is safe"
            handle = ckpt.step(2, STATE)
            assert handle is not None
            assert handle.done()
            assert ckpt.should_stop
            assert ckpt.steps() == [2]
            assert ckpt.step(3, STATE) is None
        assert signal.getsignal(signal.SIGTERM) is handler
        os.kill(os.getpid(), signal.SIGTERM)
        assert chained == [signal.SIGTERM, signal.SIGTERM], "the previous handler is back"
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_close_finishes_the_save_and_is_final(tmp_path: Path, gated: GatedDisk) -> None:
    ckpt = make(gated.at(tmp_path))
    handle = ckpt.save(1, STATE)
    assert handle is not None
    threading.Timer(0.1, gated.gate.set).start()
    ckpt.close()
    assert handle.done()
    ckpt.close()
    for use in (
        lambda: ckpt.step(2, STATE),
        lambda: ckpt.save(2, STATE),
        lambda: ckpt.restore({}),
        lambda: ckpt.load(),
        lambda: ckpt.wait(),
        lambda: ckpt.prewarm(STATE),
    ):
        with pytest.raises(asyncsave.ClosedError):
            use()
    assert asyncsave.load(tmp_path)["n"] == 1


def test_prewarm_takes_the_memory_before_the_first_save(tmp_path: Path) -> None:
    state = {"w": torch.randn(16 << 20)}
    with make(tmp_path, compression="off") as ckpt:
        before = resident()
        ckpt.prewarm(state)
        taken = resident() - before
        assert taken >= 60 << 20
        report = ckpt.save(1, state, block=True)
        assert report is not None
        assert report.result().peak_memory_bytes == 64 << 20
        assert resident() - before <= taken + (16 << 20), "and the save takes no other"


def test_one_that_is_dropped_finishes_and_warns(tmp_path: Path, gated: GatedDisk) -> None:
    ckpts = [make(gated.at(tmp_path))]
    ckpts[0].save(1, STATE)
    with pytest.warns(ResourceWarning, match="dropped without close"):
        ckpts.clear()
    gated.gate.set()

    def is_free() -> bool:
        try:
            make(gated.at(tmp_path)).close()
        except asyncsave.BusyError:
            return False
        return True

    assert eventually(is_free)
    assert_same(asyncsave.load(tmp_path), STATE)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_done_callback_is_refused(tmp_path: Path, gated: GatedDisk) -> None:
    refused = []
    with make(gated.at(tmp_path)) as ckpt:

        def callback(_: asyncsave.SaveHandle) -> None:
            for use in (lambda: ckpt.save(2, STATE), ckpt.wait, ckpt.close):
                try:
                    use()
                except asyncsave.BusyError as error:
                    refused.append(str(error))

        handle = ckpt.save(1, STATE)
        assert handle is not None
        handle.add_done_callback(callback)
        gated.gate.set()
        assert eventually(lambda: len(refused) == 3)
        assert "done callback" in refused[0]
        ckpt.save(2, STATE, block=True)
        assert ckpt.steps() == [1, 2]


SIGNALLED = """
import os, signal, sys, threading, asyncsave
ckpt = asyncsave.Checkpointer(sys.argv[1])
if sys.argv[2] == "thread":  # cannot put the handler back
    thread = threading.Thread(target=ckpt.close); thread.start(); thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
else:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_signal_that_nobody_will_look_at_is_not_swallowed(tmp_path: Path) -> None:
    ended = children.run(SIGNALLED, tmp_path, "thread", warn="ignore")
    assert ended.returncode == -signal.SIGTERM
    ended = children.run(SIGNALLED, tmp_path, "child", warn="ignore")
    assert ended.stdout == f"{-signal.SIGTERM}\n"


# -- errors ---------------------------------------------------------------------------------------


def test_a_background_failure_is_raised_once_at_the_next_call(tmp_path: Path) -> None:
    with make(tmp_path / "run", every_steps=1) as ckpt:
        ckpt.step(1, STATE)
        ckpt.wait()
        (tmp_path / "run").rename(tmp_path / "moved")
        handle = ckpt.step(2, STATE)
        assert handle is not None
        assert eventually(handle.done)
        (tmp_path / "moved").rename(tmp_path / "run")
        with pytest.raises(asyncsave.WriteError, match="No such file") as caught:
            ckpt.step(3, STATE)
        assert caught.value.path.parent == tmp_path / "run"
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        ckpt.wait()  # once; and the save of step 3 was begun all the same
        assert ckpt.steps() == [1, 3]
        assert ckpt.stats.failures == 1


def test_an_error_seen_at_the_handle_is_not_raised_again(tmp_path: Path) -> None:
    with make(tmp_path / "run") as ckpt:
        (tmp_path / "run").rename(tmp_path / "moved")
        handle = ckpt.save(1, STATE)
        assert handle is not None
        with pytest.raises(asyncsave.SaveError):
            handle.result()
        ckpt.wait()
        handle = ckpt.save(2, STATE)
        assert handle is not None
        assert isinstance(handle.exception(), asyncsave.SaveError)


def test_close_raises_what_nobody_saw(tmp_path: Path) -> None:
    ckpt = make(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    ckpt.save(1, STATE)
    with pytest.raises(asyncsave.SaveError):
        ckpt.close()
    ckpt.close()


def test_the_trainings_own_exception_is_never_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)

    def training() -> None:
        with make(tmp_path / "run") as ckpt:
            (tmp_path / "run").rename(tmp_path / "moved")
            ckpt.save(1, STATE)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        training()
    assert "a save had failed as well" in caught.value.__notes__[0]
    assert "a save failed" in caplog.text


def test_saving_from_several_threads(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        threads = [
            threading.Thread(target=lambda n=n: ckpt.save(n, {"n": torch.full((1000,), n)}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ckpt.wait()
        assert ckpt.steps() == list(range(8))
        for n in range(8):
            assert torch.equal(ckpt.load(step=n)["n"], torch.full((1000,), n))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        ckpt.save(1, STATE, block=True)
        child = os.fork()
        if child == 0:
            try:
                ckpt.save(2, STATE)
            except asyncsave.ClosedError:
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        ckpt.save(2, STATE, block=True)
        assert ckpt.steps() == [1, 2]


# -- single checkpoints ----------------------------------------------------------------------


def test_save_refuses_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a"
    asyncsave.save({"x": 1}, path).result()
    with pytest.raises(asyncsave.CheckpointExistsError, match="overwrite=True"):
        asyncsave.save({"x": 2}, path)
    assert asyncsave.load(path) == {"x": 1}
    asyncsave.save({"x": 2}, path, overwrite=True).result()
    assert asyncsave.load(path) == {"x": 2}
    assert [each.name for each in path.parent.iterdir()] == ["a"]


def test_what_comes_to_be_meanwhile_is_left_as_it_is(tmp_path: Path, gated: GatedDisk) -> None:
    handle = asyncsave.save({"x": 1}, gated.at(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    gated.gate.set()
    with pytest.raises(asyncsave.CheckpointExistsError, match="left as it is"):
        handle.result()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_save_never_replaces_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(asyncsave.CheckpointExistsError):
            asyncsave.save({"x": 2}, tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(asyncsave.CheckpointExistsError):
        asyncsave.save({"x": 2}, tmp_path / "file", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_overwriting_where_names_cannot_be_swapped(tmp_path: Path) -> None:
    place = NoExchangeDisk().at(tmp_path / "a")
    asyncsave.save({"x": 1}, place).result()
    asyncsave.save({"x": 2}, place, overwrite=True).result()
    assert asyncsave.load(tmp_path / "a") == {"x": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_of_an_overwrite(tmp_path: Path) -> None:
    """Where names cannot be swapped: the old checkpoint is hidden, the new one not yet there."""
    asyncsave.save({"x": 1}, tmp_path / "a").result()
    renames = []

    def ask(what: str, path: Path) -> None:
        if what == "rename":
            renames.append(path)
        if len(renames) > 2:  # nothing happens any more
            raise KeyboardInterrupt("as good as killed")

    place = AskingDisk(ask, NoExchangeDisk()).at(tmp_path / "a")
    handle = asyncsave.save({"x": 2}, place, overwrite=True)
    # in a thread of asyncsave it is a failure like any other; as it is, it ends an event loop
    with pytest.raises(asyncsave.SaveError, match="as good as killed"):
        handle.result()
    assert not (tmp_path / "a").exists()
    handle = asyncsave.save({"x": 3}, tmp_path / "b")  # sweeps only what is of "b"
    handle.result()
    assert not (tmp_path / "a").exists()
    with pytest.raises(asyncsave.CheckpointExistsError):
        asyncsave.save({"x": 3}, tmp_path / "a")
    assert asyncsave.load(tmp_path / "a") == {"x": 1}


def test_an_empty_state_and_a_state_that_is_no_dict(tmp_path: Path) -> None:
    asyncsave.save({}, tmp_path / "empty").result()
    assert asyncsave.load(tmp_path / "empty") == {}
    asyncsave.save(torch.ones(3), tmp_path / "tensor").result()
    assert torch.equal(asyncsave.load(tmp_path / "tensor"), torch.ones(3))
    asyncsave.save(torch.nn.Linear(2, 2), tmp_path / "module").result()
    module = torch.nn.Linear(2, 2)
    assert asyncsave.restore(tmp_path / "module", module) is None
    assert torch.equal(asyncsave.load(tmp_path / "module")["weight"], module.weight)
