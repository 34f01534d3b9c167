"""Endings: every save ends, and so does every program, whatever fails around them."""

from __future__ import annotations

import _thread
import errno
import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer, SaveHandle
from asyncsave.pipeline.background import Background
from asyncsave.pipeline.pipeline import Pipeline
from asyncsave.pipeline.target import Notes, Target
from asyncsave.run.directory import RunDirectory
from asyncsave.run.retention import Policy
from asyncsave.storage.place import PathLike, Place
from tests import children
from tests.doubles.disks import AskingDisk
from tests.doubles.fake_device import FakeDevice, make_pipeline
from tests.support import assert_same, eventually

STATE = {"w": torch.arange(1000.0), "n": 1}


def make(directory: PathLike, **options: Any) -> Checkpointer:
    return Checkpointer(directory, **{"durable": False, **options})


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if "asyncsave" in each.name]


# -- saves --------------------------------------------------------------------------------------


def test_a_handle_shows_what_is_for_its_holder() -> None:
    shown = {name for name in vars(SaveHandle) if not name.startswith("_")}
    assert shown == {"add_done_callback", "done", "exception", "result", "wait_staged"}


def test_nobody_needs_to_say_that_the_copying_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was interrupted may not come to it."""
    # No door leads there: that a signal comes just before this call is what is stood in for.
    monkeypatch.setattr(Background, "wake", lambda *_: None)
    with make(tmp_path) as ckpt:
        for step in (1, 2):
            handle = ckpt.save(step, STATE)
            assert handle is not None
            handle.result(20)
        assert_same(ckpt.load(), STATE)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["create", "write_file", "rename"])
def test_whatever_is_raised_in_the_event_loop_ends_the_handle(
    tmp_path: Path, error: type[BaseException], where: str
) -> None:
    """A file is created in the event loop itself; all else is done for it by another thread."""
    raising = True

    def ask(what: str, _: Path) -> None:
        if raising and what == where:
            raise error

    with make(AskingDisk(ask).at(tmp_path)) as ckpt:
        handle = ckpt.save(1, STATE)
        assert handle is not None
        with pytest.raises(asyncsave.SaveError, match=error.__name__) as caught:
            handle.result(20)
        assert error in [type(each) for each in causes(caught.value)]
        raising = False
        assert list(tmp_path.iterdir()) == []
        ckpt.save(2, STATE, block=True)
        assert_same(ckpt.load(step=2), STATE)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def test_a_device_error_after_the_commit_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device, tidied = FakeDevice(), threading.Event()
    device.broken = RuntimeError("CUDA error: device-side assert triggered")
    pipeline = make_pipeline(device)
    target = Target(Place(tmp_path / "a"), then=tidied.set)
    handle = save_over_a_step(pipeline, target)
    assert handle.result(20).fence_seconds == 0
    assert tidied.is_set()
    assert "at the fence is not known" in caplog.text
    assert asyncsave.verify(tmp_path / "a").chunks
    pipeline.close()


def save_over_a_step(pipeline: Pipeline, target: Target) -> SaveHandle:
    """Save a model and let its optimizer step, which waits for the late copies."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    handle = pipeline.save({"model": model}, target, 0.0)
    optimizer.step()
    return handle


def test_what_fails_after_the_commit_still_lets_the_older_ones_go(tmp_path: Path) -> None:
    run, device = RunDirectory(Place(tmp_path), Policy.parse(1, None, None)), FakeDevice()
    pipeline = make_pipeline(device)
    save_over_a_step(pipeline, run.next(1, Notes())).result(20)
    device.broken = SystemExit()
    handle = save_over_a_step(pipeline, run.next(2, Notes()))
    assert isinstance(handle.exception(20), asyncsave.SaveError)
    assert os.listdir(tmp_path) == ["step-000000002"]
    pipeline.close()
    run.close()


def test_a_callback_that_is_added_at_the_end_is_called_once() -> None:
    for _ in range(200):
        handle, called = SaveHandle(1, Path("x")), []
        ender = threading.Thread(target=lambda h=handle: h._set_report(None))
        ender.start()
        handle.add_done_callback(called.append)
        ender.join()
        assert called == [handle]


# -- threads and descriptors that run short -------------------------------------------------------


@pytest.mark.parametrize("what", ["Checkpointer", "save"])
def test_threads_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    start = threading.Thread.start
    for n in itertools.count():
        left = [n]

        def starts(thread: threading.Thread, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", starts)
            if n == 0:
                patch.setattr(_thread, "start_new_thread", refuse)
            try:
                if what == "save":
                    asyncsave.save(STATE, tmp_path / "x").result(20)
                else:
                    make(tmp_path).close()
                break
            except asyncsave.SaveError as error:
                text = str(error)
        assert "can't start new thread" in text
        assert "ulimit -u" in text
        assert threads() == []
        assert list(tmp_path.iterdir()) == []
    assert n >= 4
    make(tmp_path).close()


def refuse(*_: Any) -> None:
    raise RuntimeError("can't start new thread")


DESCRIPTORS = """
import os, resource, sys, torch, asyncsave
state = {"w": torch.ones(1000)}
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
asyncsave.save(state, sys.argv[1] + "/warm").result()
asyncsave.Checkpointer(sys.argv[1] + "/other", signals=()).close()  # all is imported by now
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
def there():
    fds = "/proc/self/fd/"
    return {each for each in os.listdir(fds) if os.path.lexists(fds + each)}
for spare in range(16):
    before = there()
    full = []
    try:
        while True:
            full.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(spare):
        os.close(full.pop())
    told = []
    for use in (
        lambda: asyncsave.save(state, f"{sys.argv[1]}/{spare}").result(),
        lambda: asyncsave.Checkpointer(f"{sys.argv[1]}/run{spare}", signals=()).close(),
    ):
        try:
            use()
        except asyncsave.AsyncSaveError as error:
            assert "oo many open files" in str(error), error
            told.append(type(error).__name__)
    for each in full:
        os.close(each)
    while any("asyncsave" in each.name for each in __import__("threading").enumerate()): pass
    left = there() - before
    assert not left, left
    with asyncsave.Checkpointer(f"{sys.argv[1]}/run{spare}", signals=()) as ckpt:
        ckpt.save(1, state, block=True)
    print(spare, told)
"""


def test_descriptors_that_run_short(tmp_path: Path) -> None:
    ended = children.run(DESCRIPTORS, tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[-1] == "15 []"
    assert "SaveError" in ended.stdout, "the event loop had none"


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_what_fails_after_the_rename_is_not_called_uncommitted(
    tmp_path: Path, error: Exception
) -> None:
    renamed: list[Path] = []

    def ask(what: str, path: Path) -> None:
        if what == "rename":
            renamed.append(path)
        if what == "sync_directory" and renamed:
            raise error

    saved = asyncsave.save({"w": torch.ones(1000)}, AskingDisk(ask).at(tmp_path / "a"))
    with pytest.raises(asyncsave.CommitError, match="is in place, but"):
        saved.result()
    assert asyncsave.load(tmp_path / "a")["w"].sum() == 1000


# -- programs -------------------------------------------------------------------------------------

FULL = """
import errno
from pathlib import Path
from tests.doubles.disks import AskingDisk
is_full = False
def refuse(what, path):
    if is_full and what == "write_file":
        raise OSError(errno.ENOSPC, "No space left on device")
directory = AskingDisk(refuse).at(Path(sys.argv[1]))
"""


def run(text: str, *arguments: object, warn: str = "error") -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has imported nothing before."""
    command = [sys.executable, "-W", warn, "-c", text, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=children.ROOT
    )


@pytest.mark.parametrize(("end", "status"), [("sys.exit()", 120), ("sys.exit(3)", 3)])
def test_leaving_a_with_block_by_exit_does_not_hide_a_failed_save(
    tmp_path: Path, end: str, status: int
) -> None:
    text = f"""
import sys, torch, asyncsave
{FULL}
is_full = True
with asyncsave.Checkpointer(directory) as ckpt:
    ckpt.save(1, {{"w": torch.ones(1000)}})
    {end}
"""
    ended = children.run(text, tmp_path)
    assert ended.returncode == status
    assert "DiskFullError" in ended.stderr
    assert ended.stderr.count("nobody asked for its result") == (status == 120)


def test_a_failed_save_lets_other_exit_handlers_do_their_work(tmp_path: Path) -> None:
    text = f"""
import atexit, multiprocessing, os, sys, tempfile, time
atexit.register(lambda: print("an older handler"))
folder = tempfile.TemporaryDirectory(dir=sys.argv[1])
child = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
child.start()
import torch, asyncsave
{FULL}
is_full = True
asyncsave.save({{"w": torch.ones(1000)}}, directory / "a")
print(child.pid)
"""
    # as an error, it would be one of the folder that is cleaned up at exit
    ended = run(text, tmp_path, warn="default")
    assert ended.returncode == 120
    assert ended.stderr.count("nobody asked for its result") == 1
    pid, handler = ended.stdout.splitlines()
    assert handler == "an older handler"
    assert list(tmp_path.iterdir()) == [], "neither a folder nor a draft"
    assert eventually(lambda: not Path(f"/proc/{pid}").exists() or state_of(int(pid)) == "Z")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("fails", [False, True])
def test_saves_in_an_exit_handler_that_is_older_than_the_import(
    tmp_path: Path, fails: bool
) -> None:
    text = f"""
import atexit, sys
def late():
    asyncsave.save(state, directory / "single")
    with asyncsave.Checkpointer(directory / "run") as again:
        again.save(1, state)
atexit.register(late)
def too_late():
    for use in (lambda: ckpt.save(2, state), lambda: ckpt.prewarm(state)):
        try:
            use()
        except asyncsave.ClosedError as error:
            print(error)
atexit.register(too_late)
import torch, asyncsave
{FULL}
state = {{"w": torch.arange(1000.0), "n": 1}}
ckpt = asyncsave.Checkpointer(directory / "closed")
ckpt.save(1, state)
def broken():
    global is_full
    is_full = {fails}
atexit.register(broken)
ckpt.wait()
"""
    ended = run(text, tmp_path)
    assert ended.stdout.count("the program ends") == 2
    assert_same(asyncsave.load(tmp_path / "closed"), STATE)
    if fails:
        assert ended.returncode == 120
        assert ended.stderr.count("nobody asked for its result") == 1, "the single save"
        assert ended.stderr.count("DiskFullError") >= 2, "the run's was raised in the handler"
    else:
        assert (ended.returncode, ended.stderr) == (0, "")
        assert_same(asyncsave.load(tmp_path / "single"), STATE)
        assert_same(asyncsave.load(tmp_path / "run"), STATE)


def test_a_pipeline_that_is_dropped_ends(tmp_path: Path) -> None:
    before = backgrounds()
    pipeline = make_pipeline()
    handle = pipeline.save(STATE, Target(Place(tmp_path / "a")), 0.0)
    del pipeline
    gc.collect()
    handle.result(20)
    assert eventually(lambda: threads() == [])
    assert os.listdir(tmp_path) == ["a"]
    gc.collect()
    assert set(backgrounds()) <= set(before), "nobody has it, not even the exit handler"


def backgrounds() -> list[Background]:
    return [each for each in gc.get_objects() if type(each) is Background]
