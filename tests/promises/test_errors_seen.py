"""Errors cannot be lost: each failure in the background reaches the user, once, with its cause."""

from __future__ import annotations

import errno
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer, SaveHandle
from asyncsave.storage.place import Place
from tests import children
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import eventually

STATE = {"w": torch.arange(1000.0)}


@pytest.fixture
def fail() -> Faults:
    """Fails the next write once it is `on`."""
    failure = Faults(0, errno.ENOSPC)
    failure.on = False
    return failure


@pytest.fixture
def place(tmp_path: Path, fail: Faults) -> Place:
    """A directory where `fail` decides."""
    return FaultDisk(fail).at(tmp_path)


def failed(ckpt: Checkpointer, fail: Faults, step: int) -> SaveHandle:
    """Return the handle of a save that has failed."""
    fail.operations.clear()
    fail.on = True
    handle = ckpt.save(step, STATE)
    assert handle is not None
    assert eventually(handle.done)
    fail.on = False
    return handle


SEE: dict[str, Callable[[Checkpointer, SaveHandle], Any]] = {
    "step": lambda ckpt, _: ckpt.step(100, STATE),
    "a step that is not due": lambda ckpt, _: ckpt.step(101, STATE),
    "save": lambda ckpt, _: ckpt.save(3, STATE),
    "a blocking save": lambda ckpt, _: ckpt.save(3, STATE, block=True),
    "wait": lambda ckpt, _: ckpt.wait(),
    "restore": lambda ckpt, _: ckpt.restore({}),
    "load": lambda ckpt, _: ckpt.load(),
    "prewarm": lambda ckpt, _: ckpt.prewarm(STATE),
    "close": lambda ckpt, _: ckpt.close(),
    "result": lambda _, handle: handle.result(),
    "with": lambda ckpt, _: ckpt.__exit__(None, None, None),
}


@pytest.mark.parametrize("how", SEE)
def test_a_failure_is_raised_once_with_its_cause(place: Place, fail: Faults, how: str) -> None:
    ckpt = Checkpointer(place, every_steps=100)
    handle = failed(ckpt, fail, 1)
    with pytest.raises(asyncsave.DiskFullError, match="No space left") as caught:
        SEE[how](ckpt, handle)
    error = caught.value
    assert error.errno == errno.ENOSPC
    assert isinstance(error.__cause__, OSError)
    text = "".join(traceback.format_exception(error))
    assert "in create_directory" in text, "where it happened, in the thread where it happened"
    assert "direct cause" in text
    ckpt.wait() if how not in ("close", "with") else ckpt.close()
    assert handle.exception() is error, "who asks again is told again"
    ckpt.close()
    assert ckpt.stats.failures == 1


def test_failures_that_pile_up_are_all_told(place: Place, fail: Faults) -> None:
    ckpt = Checkpointer(place, on_busy="skip")
    handles = []
    for step in (1, 2):
        handles.append(failed(ckpt, fail, step))
        # a second save hides the first one's failure from nobody
        if step == 1:
            with pytest.raises(asyncsave.DiskFullError):
                ckpt.wait()
    with pytest.raises(asyncsave.DiskFullError, match="step-000000002"):
        ckpt.close()
    assert ckpt.stats.failures == 2
    assert all(isinstance(handle.exception(), asyncsave.DiskFullError) for handle in handles)


def test_a_save_that_fails_while_the_next_one_waits_for_it(tmp_path: Path) -> None:
    """The next save() raises the error instead of saving: and the one after that saves."""
    fail = Faults(0, errno.EIO)
    fail.on = False
    with Checkpointer(FaultDisk(fail).at(tmp_path)) as ckpt:
        fail.on = True
        ckpt.save(1, STATE)
        with pytest.raises(asyncsave.WriteError):  # at once, or after it waited
            ckpt.save(2, STATE)
        fail.on = False
        ckpt.save(2, STATE, block=True)
        assert ckpt.steps() == [2]


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_trainings_own_exception_stays(
    place: Place, fail: Faults, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def training() -> None:
        with Checkpointer(place) as ckpt:
            failed(ckpt, fail, 1)
            raise error

    with pytest.raises(type(error)) as caught:
        training()
    assert caught.value is error
    assert "DiskFullError" in error.__notes__[0]
    assert "in create_directory" in caplog.text, "its traceback is in the log"


def test_an_error_that_was_raised_to_the_caller_is_not_raised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(*_: Any) -> None:
        raise RuntimeError("torch cannot")

    with Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", copies)
            with pytest.raises(asyncsave.StagingError, match="torch cannot"):
                ckpt.save(1, STATE)
        ckpt.wait()
        ckpt.save(1, STATE)


# -- at exit --------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, errno, threading, torch, asyncsave
from pathlib import Path
from tests.doubles.fault_disk import FaultDisk, Faults
fail = Faults(0, errno.ENOSPC)
fail.on = False
directory = FaultDisk(fail).at(Path(sys.argv[1]))
state = {"w": torch.ones(1000)}
"""


def program(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return children.run(PROGRAM + text, directory)


def test_at_exit_every_error_that_nobody_saw_is_printed(tmp_path: Path) -> None:
    text = """
for name in ("a", "b"):
    fail.on = False
    ckpt = asyncsave.Checkpointer(directory / name)
    globals()[name] = ckpt
    fail.operations.clear(); fail.on = True
    handle = ckpt.save(1, state)
    while not handle.done(): pass
    del handle
fail.on = False
print("end of training")
"""
    ended = program(text, tmp_path)
    assert ended.returncode == 120
    assert ended.stdout == "end of training\n"
    assert ended.stderr.count("nobody asked for its result") == 2
    assert ended.stderr.count("DiskFullError") == 2
    assert ended.stderr.count("in meet\n") == 2, "with tracebacks, down to where it happened"


@pytest.mark.parametrize(
    ("end", "status", "word"),
    [
        ("sys.exit(3)", 120, ""),  # what was asked for cannot be known at exit; it is non-zero
        ("raise KeyError('mine')", 1, "KeyError: 'mine'"),
        ("sys.exit(0)", 120, ""),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ],
)
def test_at_exit_the_trainings_own_status_stays(
    tmp_path: Path, end: str, status: int, word: str
) -> None:
    text = f"""
ckpt = asyncsave.Checkpointer(directory / "a")
fail.on = True
ckpt.save(1, state)
{end}
"""
    ended = program(text, tmp_path)
    assert "DiskFullError" in ended.stderr
    assert ended.stderr.count("nobody asked for its result") == 1
    assert word in ended.stderr
    assert ended.returncode == status


def test_a_program_that_swallows_everything_still_fails(tmp_path: Path) -> None:
    """One-shot saves, without anybody who holds their handles."""
    text = """
handle = asyncsave.save(state, directory / "good")
while not handle.done(): pass
del handle
fail.operations.clear(); fail.at = 5; fail.on = True  # in the background
asyncsave.save(state, directory / "bad")
"""
    ended = program(text, tmp_path)
    assert ended.returncode == 120
    assert ended.stderr.count("nobody asked for its result") == 1
    assert asyncsave.verify(tmp_path / "good").chunks == 1
    assert sorted(os.listdir(tmp_path)) == ["good"]
