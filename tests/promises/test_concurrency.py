"""Many threads, many processes, event loops, forks: one directory, one Checkpointer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.storage.place import PathLike
from tests import children
from tests.doubles.disks import GatedDisk
from tests.support import assert_same, at_once, eventually

STATE = {"w": torch.arange(1000.0), "n": 1}


def make(directory: PathLike, **options: Any) -> Checkpointer:
    return Checkpointer(directory, **{"durable": False, **options})


@pytest.fixture
def gated() -> GatedDisk:
    return GatedDisk()


@contextlib.contextmanager
def forks() -> Iterator[None]:
    """Allow to fork a process that has threads, of which 3.12 and later warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield


def in_child(check: Any) -> int:
    """Run ``check`` in a forked child; return its exit status."""
    with forks():
        child = os.fork()
    if child == 0:
        status = 99
        try:
            status = check()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- two owners -----------------------------------------------------------------------------------


def test_many_threads_want_one_directory_and_one_gets_it(tmp_path: Path) -> None:
    outcomes = at_once(8, lambda: make(tmp_path, signals=()))
    got = [each for each in outcomes if isinstance(each, Checkpointer)]
    refused = [each for each in outcomes if isinstance(each, asyncsave.BusyError)]
    assert (len(got), len(refused)) == (1, 7)
    got[0].save(1, STATE, block=True)
    got[0].close()
    make(tmp_path).close()


OWNER = """
import sys, time, torch, asyncsave
from pathlib import Path
from tests.doubles.disks import GatedDisk
disk = GatedDisk()
ckpt = asyncsave.Checkpointer(disk.at(Path(sys.argv[1])))
disk.gate.set()
ckpt.save(1, {"n": 1, "w": torch.ones(1000)}, block=True)
disk.gate.clear()
ckpt.save(2, {"n": 2, "w": torch.zeros(1000)})  # is being written when the end comes
print("owns", flush=True)
time.sleep(60)
"""


def test_a_killed_owners_directory_is_taken_over(tmp_path: Path) -> None:
    with children.start(OWNER, tmp_path) as owner:
        assert owner.stdout.readline() == "owns\n"
        with pytest.raises(asyncsave.BusyError, match="another process"):
            make(tmp_path)
        assert eventually(lambda: len(list(tmp_path.glob(".step-*"))) == 1)
        assert asyncsave.load(tmp_path)["n"] == 1, "reading needs no lock"
        owner.kill()
    with make(tmp_path) as ckpt:
        assert not list(tmp_path.glob(".*")), "what it left half-written is gone"
        assert ckpt.steps() == [1]
        state = {"n": 0, "w": torch.zeros(1000)}
        assert ckpt.restore(state) == 1
        ckpt.save(2, state, block=True)


# -- several threads, one Checkpointer ------------------------------------------------------------


def test_every_method_from_every_thread(tmp_path: Path) -> None:
    """What each thread saved is there and whole; nothing deadlocks; reading goes on meanwhile."""
    errors: list[BaseException] = []
    with make(tmp_path, every_steps=1, on_busy="wait") as ckpt:

        def work(n: int) -> None:
            try:
                for i in range(10):
                    step = 10 * n + i
                    state = {"w": torch.full((2000,), step)}
                    if i % 2:
                        ckpt.step(step, state)
                    else:
                        ckpt.save(step, state, block=i % 4 == 0)
                    state["w"].fill_(-1)
                    ckpt.wait(0.001)
                    assert set(ckpt.load()["w"].tolist()) & {-1} == set()
                    ckpt.latest_step()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        ckpt.wait()
        assert ckpt.steps() == list(range(40))
        assert ckpt.stats.saves == 40
        for step in range(40):
            assert torch.equal(ckpt.load(step=step)["w"], torch.full((2000,), step))


def test_close_during_a_save_from_another_thread(tmp_path: Path, gated: GatedDisk) -> None:
    ckpt = make(gated.at(tmp_path), signals=())
    handle = ckpt.save(1, STATE)
    outcomes: list[Any] = []

    def waits() -> None:
        try:
            outcomes.append(ckpt.save(2, STATE, block=True))  # waits for the first one's end
        except asyncsave.ClosedError as error:
            outcomes.append(error)

    saver = threading.Thread(target=waits)
    saver.start()
    time.sleep(0.05)
    closers = [threading.Thread(target=ckpt.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    time.sleep(0.05)
    assert not handle.done()
    assert all(closer.is_alive() for closer in closers), "close() finishes what was begun"
    gated.gate.set()
    for thread in (saver, *closers):
        thread.join(20)
        assert not thread.is_alive()
    assert handle.done()
    assert len(outcomes) == 1
    # either it had its turn before the close, and then it is there; or it was told
    there = [1] if isinstance(outcomes[0], asyncsave.ClosedError) else [1, 2]
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == there
    make(gated.at(tmp_path)).close()


def test_a_thread_that_waits_for_the_handle_while_it_is_closed(
    tmp_path: Path, gated: GatedDisk
) -> None:
    ckpt = make(gated.at(tmp_path))
    handle = ckpt.save(1, STATE)
    assert handle is not None
    reports: list[asyncsave.SaveReport] = []
    threads = [threading.Thread(target=lambda: reports.append(handle.result(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    threading.Timer(0.05, gated.gate.set).start()
    ckpt.close()
    for thread in threads:
        thread.join()
    assert len({id(report) for report in reports}) == 1
    assert len(reports) == 4


# -- forks ----------------------------------------------------------------------------------------


def test_a_fork_during_a_save_disturbs_neither(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path / "run")) as ckpt:
        handle = ckpt.save(1, STATE)
        assert handle is not None

        def check() -> int:
            for use in (
                lambda: ckpt.save(2, STATE),
                lambda: ckpt.step(2, STATE),
                lambda: ckpt.wait(),
                lambda: ckpt.restore({}),
            ):
                try:
                    use()
                except asyncsave.ClosedError:
                    continue
                return 1
            ckpt.close()  # does nothing: the save is the parent's
            try:
                make(gated.at(tmp_path / "run"))
            except asyncsave.BusyError:
                pass
            else:
                return 2
            asyncsave.save({"x": 1}, tmp_path / "childs").result(20)  # it can have its own
            return 7

        assert in_child(check) == 7
        assert not handle.done()
        with pytest.raises(asyncsave.BusyError):
            make(gated.at(tmp_path / "run"))
        gated.gate.set()
        handle.result(20)
        ckpt.save(2, STATE, block=True)
        assert ckpt.steps() == [1, 2]
    assert asyncsave.load(tmp_path / "childs") == {"x": 1}
    make(gated.at(tmp_path / "run")).close()


def test_a_child_that_outlives_its_parents_checkpointer_holds_nothing(
    tmp_path: Path,
) -> None:
    ckpt = make(tmp_path)
    ours, childs = os.pipe()
    with forks():
        child = os.fork()
    if child == 0:
        os.close(childs)
        os.read(ours, 1)  # until the parent lets go
        os._exit(0)
    ckpt.save(1, STATE, block=True)
    ckpt.close()
    with make(tmp_path) as again:
        assert again.steps() == [1]
    os.close(childs)
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0


FORKED_AFTER_IMPORT = """
import os, sys, torch, asyncsave
child = os.fork()
with asyncsave.Checkpointer(sys.argv[1] + ("/child" if child == 0 else "/parent")) as ckpt:
    ckpt.save(1, {"w": torch.arange(100_000.0)})
if child: assert os.waitpid(child, 0)[1] == 0
"""


def test_a_fork_after_import_saves_like_any_process(tmp_path: Path) -> None:
    ended = children.run(FORKED_AFTER_IMPORT, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    for name in ("parent", "child"):
        assert torch.equal(asyncsave.load(tmp_path / name)["w"], torch.arange(100_000.0))


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((4,), float(i))


def test_data_loader_workers_are_forked_while_a_save_runs(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path)) as ckpt:
        handle = ckpt.save(1, STATE)
        assert handle is not None
        loader = torch.utils.data.DataLoader(
            Numbers(), batch_size=8, num_workers=2, multiprocessing_context="fork"
        )
        total = 0.0
        with forks():
            for i, batch in enumerate(loader):
                total += batch.sum().item()
                if i == 3:
                    gated.gate.set()
        assert total == 4 * sum(range(64))
        handle.result(20)
        ckpt.save(2, STATE, block=True)
        assert_same(ckpt.load(), STATE)


# -- event loops ----------------------------------------------------------------------------------


def test_inside_a_running_event_loop(tmp_path: Path, gated: GatedDisk) -> None:
    """As in a notebook: save() does not touch the caller's loop, and awaiting leaves it free."""

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        with make(gated.at(tmp_path)) as ckpt:
            handle = ckpt.save(1, STATE)
            assert handle is not None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(handle, 0.1)
            assert not handle.done(), "who gives up waiting does not cancel the save"
            assert ticks > 5
            waiting = [asyncio.create_task(wait(handle)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            gated.gate.set()
            reports = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(reports[0], asyncio.CancelledError)
            assert reports[1] is reports[2] is await handle
            nested = await asyncio.to_thread(asyncio.run, wait(handle))
            assert nested is reports[1]
        ticking.cancel()

    async def wait(handle: asyncsave.SaveHandle) -> asyncsave.SaveReport:
        return await handle

    asyncio.run(main(), debug=True)
    assert_same(asyncsave.load(tmp_path), STATE)


def test_many_saves_at_once_in_one_event_loop(tmp_path: Path) -> None:
    async def main() -> list[asyncsave.SaveReport]:
        handles = [asyncsave.save({"i": i}, tmp_path / str(i)) for i in range(4)]
        return await asyncio.gather(*handles)

    assert [report.path.name for report in asyncio.run(main())] == list("0123")
    assert [asyncsave.load(tmp_path / str(i)) for i in range(4)] == [{"i": i} for i in range(4)]


def test_a_loop_that_ends_before_the_save(tmp_path: Path, gated: GatedDisk) -> None:
    with make(gated.at(tmp_path)) as ckpt:

        async def main() -> asyncsave.SaveHandle:
            handle = ckpt.save(1, STATE)
            assert handle is not None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(handle, 0.02)
            return handle

        handle = asyncio.run(main())
        gated.gate.set()
        handle.result(20)  # and nobody calls into the loop that is closed
        assert ckpt.steps() == [1]


# -- callbacks, and savers that are dropped -------------------------------------------------------


def test_callbacks_that_raise_harm_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []
    with make(tmp_path) as ckpt:
        for step in range(3):
            handle = ckpt.save(step, STATE)
            assert handle is not None
            handle.add_done_callback(lambda _: sys.exit(3))
            handle.add_done_callback(lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            handle.add_done_callback(lambda h: called.append(h.step))  # type: ignore[arg-type]
            handle.result(20)
        ckpt.wait()
        assert ckpt.steps() == [0, 1, 2]
    assert eventually(lambda: called == [0, 1, 2])
    assert caplog.text.count("a done callback of") == 6


def test_a_save_whose_handle_and_saver_are_dropped(tmp_path: Path, gated: GatedDisk) -> None:
    ckpts: list[Any] = [make(gated.at(tmp_path))]
    ckpts[0].save(1, STATE)
    ckpts.append(ckpts)  # a cycle, which the garbage collector finds
    del ckpts
    with pytest.warns(ResourceWarning, match="dropped without close"):
        gc.collect()
    gated.gate.set()
    assert eventually(lambda: (tmp_path / "step-000000001").exists())
    assert eventually(
        lambda: not any("asyncsave" in thread.name for thread in threading.enumerate())
    )
    make(gated.at(tmp_path)).close()  # the directory is free
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_same(asyncsave.load(tmp_path), STATE)


def test_a_single_save_needs_nobody_to_hold_it(tmp_path: Path) -> None:
    for i in range(5):
        asyncsave.save({"i": i}, tmp_path / str(i))
        gc.collect()
    assert eventually(lambda: all((tmp_path / str(i)).exists() for i in range(5)))
    assert eventually(
        lambda: not any("asyncsave" in thread.name for thread in threading.enumerate())
    )


# -- loading --------------------------------------------------------------------------------------

FIRST_LOADS = """
import sys, threading, asyncsave

sys.setswitchinterval(1e-6)
together, loaded = threading.Barrier(8), []

def load():
    together.wait()
    loaded.append(asyncsave.load(sys.argv[1])["n"])

threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(loaded)
"""


def test_the_first_loads_of_a_process_come_at_the_same_time(tmp_path: Path) -> None:
    """One in three such processes crashed, while msgspec found out what a manifest is."""
    asyncsave.save(STATE, tmp_path / "a").result()
    for _ in range(8):
        ended = children.run(FIRST_LOADS, tmp_path / "a")
        assert (ended.returncode, ended.stdout) == (0, f"{[1] * 8}\n"), ended.stderr
