"""Interrupts: Ctrl-C, and handlers that raise, at every point of whatever the training calls.

A signal's handler runs in the main thread between two instructions: when a function is entered, or
after a call has returned. The sweeps raise there, at each such point in turn: at every entry of a
function, ours or another's (``call``), and after every call into C (``c_return``). After each they
save, load and close: nothing may hang, and no slot, error, checkpoint, thread or lock may be lost.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch

import asyncsave
import asyncsave.pipeline.handle
import asyncsave.reading.workers
from asyncsave import Checkpointer
from asyncsave.pipeline.save import Target
from asyncsave.storage.place import Place
from asyncsave.storage.steps import list_steps
from tests import counts
from tests.doubles.disks import WatchedDisk, WrappedDisk
from tests.doubles.fake_device import FakeDevice, make_pipeline
from tests.support import assert_same, eventually
from tests.sweeps.slots import all_free

pytestmark = [
    # the interpreter swallows what is raised in __del__ and while it closes a dropped generator
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Memory in which these states are cut into chunks of 64 KiB, since longer ones would not fit:
ROOM = 560 << 10  # for all of them
WAVES = 192 << 10  # for two
ENCODED_ROOM, ENCODED_WAVES = 2400 << 10, 2 << 20  # and an encoder
STATE = {"w": torch.arange(70_000.0), "b": torch.arange(9), "n": 1, "list": [torch.ones(3)]}
OTHER = {"w": torch.arange(70_000.0) + 1, "b": torch.arange(9), "n": 2, "list": [torch.ones(3)]}


def is_lost(frame: FrameType, arg: Any) -> bool:
    """Whether Python itself loses something where it is interrupted there."""
    code = frame.f_code
    if code.co_filename == threading.__file__ and "Condition." in code.co_qualname:
        return True  # its lock: that is held for ever, or released though nobody holds it
    if code is threading.Thread.start.__code__:
        return getattr(arg, "__name__", "") == "__exit__"  # that it is about to start a thread
    return arg is os.open  # a descriptor, which is a bare number still


class Point:
    """One point of time of what is called in the main thread: its n-th event of these kinds.

    Args:
        how: raises there.
    """

    watch = staticmethod(sys.setprofile)

    def __init__(self, n: int, kinds: set[str], how: Callable[[], None]) -> None:
        self.n, self.kinds, self.how = n, kinds, how
        self.seen = 0
        self.stop: BaseException | None = None
        self.where = ""

    def __call__(self, frame: FrameType, kind: str, arg: Any) -> None:
        if kind not in self.kinds or is_lost(frame, arg):
            return
        self.seen += 1
        if self.seen == self.n:
            code = frame.f_code
            self.where = f"{kind} {self.n}: {code.co_filename}:{frame.f_lineno} {code.co_name}"
            if arg is not None:
                self.where += f" after {arg!r}"
            self.watch(None)
            self.how()

    def run(self, call: Callable[[], object]) -> None:
        """Make the call, and swallow the interrupt."""
        self.watch(self)
        try:
            call()
        except (KeyboardInterrupt, SystemExit) as stop:
            self.stop = stop
        finally:
            self.watch(None)

    def told(self) -> bool:
        """Whether who reads the interrupt's traceback reads of the failed save as well."""
        error = self.stop
        while error is not None and not isinstance(error, asyncsave.SaveError):
            error = error.__context__
        return error is not None


class Instruction(Point):
    """One instruction of what awaits readers in the main thread.

    Not of what starts them: between two instructions there, Python forgets what it has begun.
    """

    watch = staticmethod(sys.settrace)

    def __call__(self, frame: FrameType, kind: str, arg: Any) -> Any:
        code = frame.f_code
        joins = code.co_qualname in ("Thread.join", "Thread._wait_for_tstate_lock")
        if not joins and code.co_filename != asyncsave.reading.workers.__file__:
            return None
        frame.f_trace_opcodes = True
        if kind != "opcode":
            return self
        self.seen += 1
        if self.seen != self.n:
            return self
        self.where = f"{self.n}: {code.co_filename}:{frame.f_lineno} {code.co_name} {frame.f_lasti}"
        self.watch(None)
        return self.how()


class FailingDisk(WrappedDisk):
    """Commits fail while ``broken``."""

    broken = False

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_file(path, data, sync=sync)


def by_raising() -> None:
    raise KeyboardInterrupt


def by_a_handler() -> None:
    """SystemExit, as a handler of SIGTERM raises it that calls ``sys.exit``."""
    os.kill(os.getpid(), signal.SIGUSR1)


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, leave)
    yield
    signal.signal(signal.SIGUSR1, before)


def make(directory: Path | Place, **options: Any) -> Checkpointer:
    few: dict[str, Any] = {"durable": False, "compression": "off", "memory_limit": ROOM}
    return Checkpointer(directory, **{**few, **options})


def fail_a_save(ckpt: Checkpointer, disk: FailingDisk) -> None:
    """Let a save fail in the background, unseen."""
    disk.broken = True
    handle = ckpt.save(7, OTHER)
    assert handle is not None
    assert eventually(handle.done)
    disk.broken = False


def save_another(ckpt: Checkpointer, _: FailingDisk) -> None:
    ckpt.save(1, OTHER, block=True)


def nothing(ckpt: Checkpointer, _: FailingDisk) -> None:
    pass


def waiting(ckpt: Checkpointer) -> None:
    ckpt.save(2, STATE)
    ckpt.wait()


def closing(ckpt: Checkpointer) -> None:
    ckpt.save(2, STATE)
    ckpt.close()


def leaving(ckpt: Checkpointer) -> None:
    with ckpt:
        ckpt.save(2, STATE)


# what is interrupted: options, what comes before it, the call itself
CALLS: dict[
    str,
    tuple[
        dict[str, Any],
        Callable[[Checkpointer, FailingDisk], object],
        Callable[[Checkpointer], object],
    ],
] = {
    "the first save": ({}, nothing, lambda ckpt: ckpt.save(2, STATE)),
    "the first save, which asks the system": (
        {"memory_limit": "auto"},
        nothing,
        lambda ckpt: ckpt.save(2, STATE),
    ),
    "a save": ({}, save_another, lambda ckpt: ckpt.save(2, STATE)),
    "a save after one": (
        {},
        lambda ckpt, _: ckpt.save(1, OTHER),
        lambda ckpt: ckpt.save(2, STATE),
    ),
    "a save, encoded, in waves": (
        {"compression": 1, "memory_limit": ENCODED_WAVES},
        save_another,
        lambda ckpt: ckpt.save(2, STATE),
    ),
    "a save in waves": ({"memory_limit": WAVES}, save_another, lambda ckpt: ckpt.save(2, STATE)),
    "a blocking save": ({}, nothing, lambda ckpt: ckpt.save(2, STATE, block=True)),
    "step": ({"every_steps": 2, "keep_last": 2}, nothing, lambda ckpt: ckpt.step(2, STATE)),
    "prewarm": ({}, nothing, lambda ckpt: ckpt.prewarm(STATE)),
    "wait": ({}, nothing, waiting),
    "close": ({}, nothing, closing),
    "with": ({}, nothing, leaving),
    "save after a failure": ({}, fail_a_save, lambda ckpt: ckpt.save(2, STATE)),
    "wait after a failure": ({}, fail_a_save, lambda ckpt: ckpt.wait()),
    "close after a failure": ({}, fail_a_save, lambda ckpt: ckpt.close()),
}
CLOSES = {"close", "with", "close after a failure"}
FAST = {name: 23 if "after a" not in name else 11 for name in CALLS}


def assert_all_told() -> None:
    """Assert that no error waits to be told at exit.

    Private, since only the end of the process shows it, and there is one for all these tests.
    """
    assert not asyncsave.pipeline.handle._unseen


def nothing_left(directory: Path) -> None:
    """Assert that nobody holds the directory, and that nothing half-written is in it."""
    assert_all_told()
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert grad
    assert not torch.is_inference_mode_enabled()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with make(directory):
        assert not list(directory.glob(".*")), "swept"


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if "asyncsave" in each.name]


def wait_or_close(ckpt: Checkpointer) -> None:
    """Ask once more for an error that nobody was told, as is possible now."""
    try:
        ckpt.wait()
    except asyncsave.ClosedError:
        ckpt.close()


def survives(directory: Path, name: str, point: Point) -> bool:
    """Interrupt one call at one point; return whether there was such a point."""
    options, before, call = CALLS[name]
    disk = FailingDisk()
    ckpt = make(disk.at(directory), **options)
    before(ckpt, disk)
    failed, told = "failure" in name, False
    try:
        point.run(lambda: call(ckpt))
    except asyncsave.SaveError:
        told = True
    told = told or point.told()
    try:
        if failed and not told:
            with pytest.raises(asyncsave.DiskFullError):
                wait_or_close(ckpt)
        try:
            assert ckpt.wait()
            ckpt.save(3, OTHER, block=True)
        except asyncsave.ClosedError:
            assert name in CLOSES, "nobody has closed it"
        else:
            assert_same(ckpt.load(step=3), OTHER)
            assert all_free(ckpt)
    finally:
        ckpt.close()
    # private: who is interrupted in a save does not get its handle
    handle = ckpt._pipeline.current
    assert handle is None or handle.done()
    assert threads() == []
    for step in list_steps(Place(directory)):
        assert_same(asyncsave.load(directory / f"step-{step:09}"), STATE if step == 2 else OTHER)
    if not failed and name not in ("wait", "close", "with") and point.stop is None:
        assert name == "prewarm" or (directory / "step-000000002").exists()
    nothing_left(directory)
    return point.where != ""


def sweep(
    directory: Path,
    each: Callable[[Path, Point], bool],
    stride: int,
    kinds: set[str],
    point_of: type[Point] = Point,
) -> None:
    """Try every ``stride``-th point of a call until it ends before the point comes."""
    for n in itertools.count(1, stride):
        how = by_raising if n // stride % 2 else by_a_handler
        point = point_of(n, kinds, how)
        try:
            there = each(directory / str(n), point)
        except BaseException as error:
            error.add_note(f"interrupted by {how.__name__} at {point.where}")
            raise
        if not there:
            assert n > 1
            return
        counts.add("interrupts")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_interrupted(tmp_path: Path, name: str) -> None:
    sweep(tmp_path, lambda path, point: survives(path, name, point), FAST[name], {"call"})


def test_there_are_several_chunks_to_interrupt(tmp_path: Path) -> None:
    for name, (options, _, _) in CALLS.items():
        with make(tmp_path / name, **options) as ckpt:
            handle = ckpt.save(1, STATE)
            assert handle is not None
            # with memory to spare, there are as few as there are kinds of numbers
            assert handle.result().chunks == (2 if options.get("memory_limit") == "auto" else 6)
    single = asyncsave.save(STATE, tmp_path / "x", memory_limit=ENCODED_ROOM)
    assert single.result().chunks == 6


def constructs(directory: Path, point: Point) -> bool:
    made: list[Checkpointer] = []
    point.run(lambda: made.append(make(directory)))
    for each in made:
        each.close()
    assert eventually(lambda: threads() == [])
    nothing_left(directory)
    return point.where != ""


def test_the_constructor_is_interrupted(tmp_path: Path) -> None:
    sweep(tmp_path, constructs, 5, {"call"})


def saves_once(directory: Path, point: Point) -> bool:
    point.run(lambda: asyncsave.save(STATE, directory / "x", memory_limit=ENCODED_ROOM))
    assert eventually(lambda: threads() == [])
    if point.stop is None or (directory / "x").exists():
        assert_same(asyncsave.load(directory / "x"), STATE)
    asyncsave.save(OTHER, directory / "x", memory_limit=ENCODED_ROOM, overwrite=True).result(20)
    assert eventually(lambda: threads() == [])
    assert_same(asyncsave.load(directory / "x"), OTHER)
    assert [each.name for each in directory.iterdir()] == ["x"]
    nothing_left(directory)
    return point.where != ""


def test_a_single_save_is_interrupted(tmp_path: Path) -> None:
    sweep(tmp_path, saves_once, 17, {"call"})


def stages_late(directory: Path, point: Point) -> bool:
    """A save from a device, whose copies end at the fence."""
    device = FakeDevice()
    pipeline = make_pipeline(device, memory_limit=270 << 10)  # 3 chunks
    model = torch.nn.Linear(300, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "b": STATE["b"]}
    directory.mkdir()
    point.run(lambda: pipeline.save(state, Target(Place(directory / "a")), 0.0))
    device.finish()
    current = pipeline.current
    if current is not None:
        assert eventually(current.done, 20)
    handle = pipeline.save(state, Target(Place(directory / "b")), 0.0)
    model(torch.ones(300)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert handle.result(20).chunks == 3
    pipeline.close()
    assert torch.equal(asyncsave.load(directory / "b")["model"]["weight"], before)
    assert_all_told()
    return point.where != ""


def test_a_save_with_late_copies_is_interrupted(tmp_path: Path) -> None:
    sweep(tmp_path, stages_late, 23, {"call"})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["call", "c_return"])
@pytest.mark.parametrize("name", [*CALLS, "constructor", "a single save", "late copies"])
def test_every_point_is_interrupted(tmp_path: Path, name: str, kind: str) -> None:
    others = {"constructor": constructs, "a single save": saves_once, "late copies": stages_late}
    each = others.get(name, lambda path, point: survives(path, name, point))
    sweep(tmp_path, each, 1, {kind})


# -- restoring -------------------------------------------------------------------------------

LARGE = {"w": torch.arange(1_500_000.0), "b": torch.arange(9)}  # for which there are readers


def restores(directory: Path, point: Point) -> bool:
    """Interrupt a restore; whatever the point, nobody reads on behind the caller's back."""
    saved = directory.parent / "saved"
    if not saved.exists():
        asyncsave.save(LARGE, saved, compression="off", memory_limit=3 << 20).result()
    disk = WatchedDisk(lambda: time.sleep(0.001))
    live = {"w": torch.zeros(1_500_000), "b": torch.zeros(9, dtype=torch.int64)}
    point.run(lambda: asyncsave.restore(disk.at(saved), live))
    assert not disk.reading
    reads, then = disk.reads, {name: value.clone() for name, value in live.items()}
    assert eventually(lambda: threads() == [])
    assert not disk.closed
    assert disk.reads == reads
    assert_same(live, then)
    if point.stop is None:
        assert_same(live, LARGE)
    asyncsave.restore(saved, live)
    assert_same(live, LARGE)
    return point.where != ""


def test_a_restore_is_interrupted(tmp_path: Path) -> None:
    sweep(tmp_path, restores, 41, {"call"})
    assert asyncsave.verify(tmp_path / "saved").chunks >= 6


def test_a_restore_is_interrupted_where_it_has_readers(tmp_path: Path) -> None:
    sweep(tmp_path, restores, 13, set(), Instruction)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["call", "c_return", "opcode"])
def test_every_point_of_a_restore_is_interrupted(tmp_path: Path, kind: str) -> None:
    sweep(tmp_path, restores, 1, {kind}, Instruction if kind == "opcode" else Point)


def test_whoever_interrupts_a_restore_again_and_again_is_told_once(tmp_path: Path) -> None:
    """The readers hang in the disk, and nobody may go on before they have come back."""
    asyncsave.save(LARGE, tmp_path / "saved", compression="off", memory_limit=3 << 20).result()
    gate, seen = threading.Event(), list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(len(seen))
        raise KeyboardInterrupt(seen[-1])

    def interrupts() -> None:
        assert eventually(lambda: disk.reading >= 2)
        for i in range(20):
            interrupt()
            assert eventually(lambda i=i: len(seen) > i)  # type: ignore[misc]
        gate.set()

    disk = WatchedDisk(gate.wait)
    live = {"w": torch.zeros(1_500_000), "b": torch.zeros(9, dtype=torch.int64)}
    before = signal.signal(signal.SIGINT, handle)
    timer = threading.Thread(target=interrupts)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt) as caught:
            asyncsave.restore(disk.at(tmp_path / "saved"), live)
        assert (gate.is_set(), disk.reading, disk.closed) == (True, 0, [])
    finally:
        gate.set()
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert caught.value.args == (0,)
    assert len(seen) == 20


# -- real signals -----------------------------------------------------------------------------


def test_a_hundred_real_interrupts_at_random_moments(tmp_path: Path) -> None:
    """SIGINT from another thread while this one saves, waits and steps; nothing is lost of it."""
    random = Random(0)
    with make(tmp_path, every_steps=1, keep_last=3) as ckpt:
        step = hits = 0
        while hits < 100:
            state: dict[str, Any] = {"w": torch.full((70_000,), float(step)), "b": STATE["b"]}
            timer = threading.Timer(random.uniform(0, 0.012), interrupt)
            try:
                timer.start()
                for _ in range(40):
                    step += 1
                    state["w"].fill_(step)
                    ckpt.step(step, state)
                    if step % 3 == 0:
                        ckpt.wait()
                time.sleep(1)
            except KeyboardInterrupt:
                hits += 1
            timer.join()
            step += 1
            state["w"].fill_(step)
            ckpt.save(step, state, block=True)
            loaded = ckpt.load()
            assert torch.equal(loaded["w"], state["w"])
            assert all_free(ckpt)
        counts.add("interrupts", hits)
        for each in ckpt.steps():
            assert torch.equal(ckpt.load(step=each)["w"], torch.full((70_000,), float(each)))
    assert threads() == []
    nothing_left(tmp_path)


def interrupt() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


# -- who is inside already -----------------------------------------------------------------------

USES: dict[str, Callable[[Checkpointer], object]] = {
    "save": lambda ckpt: ckpt.save(5, STATE),
    "step": lambda ckpt: ckpt.step(5, STATE),
    "wait": lambda ckpt: ckpt.wait(),
    "restore": lambda ckpt: ckpt.restore({}),
    "load": lambda ckpt: ckpt.load(),
    "prewarm": lambda ckpt: ckpt.prewarm(STATE),
    "close": lambda ckpt: ckpt.close(),
    "with": lambda ckpt: ckpt.__exit__(None, None, None),
}


@pytest.mark.parametrize("use", USES)
def test_a_handler_that_comes_during_a_save_is_refused(tmp_path: Path, use: str) -> None:
    refused: list[asyncsave.BusyError] = []

    class Model:
        def state_dict(self) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGUSR1)
            return {"w": STATE["w"]}

    def handle(number: int, frame: FrameType | None) -> None:
        with pytest.raises(asyncsave.BusyError, match="at work in this thread") as caught:
            USES[use](ckpt)
        refused.append(caught.value)
        asyncsave.save(STATE, tmp_path / "elsewhere", overwrite=True).result(20)  # is another's

    before = signal.signal(signal.SIGUSR1, handle)
    with make(tmp_path / "run", every_steps=1) as ckpt:
        ckpt.save(1, {"model": Model()}, block=True)
        assert len(refused) == 1
        assert_same(ckpt.load(), {"model": {"w": STATE["w"]}})
        USES[use](ckpt)
    signal.signal(signal.SIGUSR1, before)
    assert_same(asyncsave.load(tmp_path / "elsewhere"), STATE)
