"""A save that cannot succeed: the right error, nothing harmed, and the next one works."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer

from .support import FailingFileSystem, Failure, assert_same

FULL = (errno.ENOSPC, errno.EDQUOT)


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.randn(40_000, generator=torch.Generator().manual_seed(step)), "step": step}


def run(directory: Path, fail: Failure, monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Save 1 to 3 with retention; one operation of 3 fails; then save 4. Return what was raised."""
    filesystem = FailingFileSystem(fail)
    monkeypatch.setattr("asyncsave.checkpointer.LocalFileSystem", lambda: filesystem)
    errors: list[BaseException] = []
    fail.armed = False
    # chunks of 64 KiB: several writes in a save
    with Checkpointer(directory, compression=1, memory_limit=2 << 20, keep_last=2) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step), block=True)
        fail.armed = True
        handle = ckpt.save(3, state_of(3))
        assert handle is not None
        error = handle.exception()
        if error is not None:
            errors.append(error)
        fail.armed = False
        slots, frames = ckpt._pipeline._memory.slots, ckpt._pipeline._memory.frames
        assert slots is not None
        assert frames is not None
        assert (slots.free, frames.free) == (slots.count, frames.count)
        after = ckpt.steps()
        if isinstance(error, asyncsave.SaveError):
            assert after == [1, 2]
        else:
            assert 3 in after
        for step in after:
            assert_same(ckpt.load(step=step), state_of(step))
        ckpt.save(4, state_of(4), block=True)
        assert_same(ckpt.load(), state_of(4))
        steps = ckpt.steps()
    # what could not be removed is a hidden leftover that the next run sweeps
    monkeypatch.undo()
    with Checkpointer(directory):
        pass
    assert sorted(path.name for path in directory.iterdir()) == [f"step-{s:09d}" for s in steps]
    asyncsave.verify(directory)
    return errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_every_operation_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    seen: set[str] = set()
    for i in range(100):
        fail = Failure(i, number)
        errors = run(tmp_path / str(i), fail, monkeypatch)
        if len(fail.operations) <= i:
            break  # the save has fewer operations: all have failed once
        operation = fail.operations[i]
        seen.add(operation)
        if not errors:
            assert operation in ("rename", "sync_directory", "remove_tree"), "pruning may fail"
            assert fail.operations[: i + 1].count("rename") + (operation != "rename") >= 2
            continue
        (error,) = errors
        if isinstance(error, asyncsave.CommitError):
            assert operation == "sync_directory"
        else:
            assert isinstance(error, asyncsave.WriteError)
            assert isinstance(error, asyncsave.DiskFullError) == (number in FULL)
            assert error.errno == number
            assert error.path.is_relative_to(tmp_path)
        assert isinstance(error.__cause__, OSError)
    else:
        pytest.fail("the sweep did not end")
    assert {"create_directory", "create", "write", "sync", "close", "write_file"} <= seen
    assert {"sync_directory", "rename", "remove_tree"} <= seen


def test_the_commit_is_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Failure(10**9, errno.EIO)
    run(tmp_path / "run", fail, monkeypatch)
    fail = Failure(10**9, errno.EIO)
    filesystem = FailingFileSystem(fail)
    monkeypatch.setattr("asyncsave.checkpointer.LocalFileSystem", lambda: filesystem)
    with Checkpointer(tmp_path / "order", keep_last=1) as ckpt:
        ckpt.save(1, {"w": torch.ones(10)}, block=True)
        ckpt.save(2, {"w": torch.ones(10)}, block=True)
    once = [
        *("create_directory", "create", "write", "sync", "close"),
        *("write_file", "write_file", "sync_directory", "rename", "sync_directory"),
    ]
    prune = ["rename", "sync_directory", "remove_tree"]
    operations = fail.operations[fail.operations.index("create_directory") :]
    assert operations == [*once, *once, *prune]


def test_an_error_that_is_a_bug_is_still_a_save_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with Checkpointer(tmp_path, compression=1) as ckpt:
        ckpt.save(1, state_of(1), block=True)
        with monkeypatch.context() as patch:
            patch.setattr("asyncsave.codec.frame.Encoder.encode", broken)
            handle = ckpt.save(2, state_of(2))
            assert handle is not None
            with pytest.raises(asyncsave.SaveError, match="a bug") as caught:
                handle.result()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        ckpt.save(2, state_of(2), block=True)
        assert ckpt.steps() == [1, 2]


def test_failing_while_the_stager_waits_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is larger than the memory, so the training thread waits when the disk fails."""
    fail = Failure(10**9, errno.ENOSPC)
    filesystem = FailingFileSystem(fail)
    monkeypatch.setattr("asyncsave.checkpointer.LocalFileSystem", lambda: filesystem)
    state = {"w": torch.randn(8 << 20)}
    with Checkpointer(tmp_path, compression="off", memory_limit=4 << 20) as ckpt:
        ckpt.save(1, state, block=True)
        fail.at = len(fail.operations) + 3
        handle = ckpt.save(2, state)
        assert handle is not None
        with pytest.raises(asyncsave.DiskFullError, match="keep fewer checkpoints"):
            handle.result()
        ckpt.save(3, state, block=True)
        assert ckpt.steps() == [1, 3]


def test_a_failed_copy_is_a_staging_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:

            def broken(*_: Any) -> Any:
                raise RuntimeError("device-side assert")

            patch.setattr("asyncsave.snapshot.snapshotter._bind", broken)
            with pytest.raises(asyncsave.StagingError, match="device-side assert"):
                ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2), block=True)
        assert ckpt.steps() == [2]
        assert ckpt.stats.failures == 1


def test_a_commit_of_unknown_outcome_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing: the names are swapped, then the directory cannot be synced. Both stay."""
    fail = Failure(10**9, errno.EIO)
    filesystem = FailingFileSystem(fail)
    monkeypatch.setattr("asyncsave.single.LocalFileSystem", lambda: filesystem)
    asyncsave.save({"x": 1}, tmp_path / "a").result()
    fail.at = len(fail.operations) + 8
    handle = asyncsave.save({"x": 2}, tmp_path / "a", overwrite=True)
    with pytest.raises(asyncsave.CommitError):
        handle.result()
    assert asyncsave.load(tmp_path / "a") == {"x": 2}
    (old,) = tmp_path.glob(".a.*")
    assert asyncsave.load(old) == {"x": 1}
