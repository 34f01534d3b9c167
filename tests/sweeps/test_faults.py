"""Saves, loads and removals that cannot succeed: the right error, nothing harmed, and on it goes.

Every sweep here lets the i-th operation on the disk misbehave, for every i until there are no more.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import asyncsave
from asyncsave import Checkpointer
from asyncsave.storage.disk import WritableFile
from asyncsave.storage.draft import hidden
from asyncsave.storage.place import Place
from tests import counts
from tests.doubles.disks import WrappedDisk, WrappedFile
from tests.doubles.fault_disk import BlindDisk, Fault, FaultDisk, Faults
from tests.support import assert_same, eventually
from tests.sweeps.slots import all_free

FULL = (errno.ENOSPC, errno.EDQUOT)
NUMBERS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE]
every_errno = pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
two_errnos = pytest.mark.parametrize("number", NUMBERS[:2], ids=errno.errorcode.get)
# chunks of 64 KiB: several writes in a save
SMALL: dict[str, Any] = {"compression": 1, "memory_limit": 2 << 20}


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.randn(40_000, generator=torch.Generator().manual_seed(step)), "step": step}


def each_operation(fault: Fault, **options: Any) -> Iterator[Faults]:
    """Yield faults for the first operation, the second, …, until one is not reached any more."""
    for i in range(1000):
        faults = Faults(i, fault, **options)
        yield faults
        if len(faults.operations) <= i:
            return
        if faults.hit is not None:
            counts.add("flips" if fault == "flip" else "faults")
    pytest.fail("the sweep did not end")


def held() -> tuple[int, int]:
    """Return how many descriptors and threads there are."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def error_of(save: Callable[[], asyncsave.SaveHandle | None]) -> BaseException | None:
    """Return what a save comes to, whether its call says so or its handle."""
    try:
        handle = save()
    except asyncsave.AsyncSaveError as error:
        return error
    assert handle is not None
    return handle.exception()


def assert_is(error: BaseException, number: int, directory: Path) -> None:
    """Assert that ``error`` says in asyncsave's words that the disk said ``number``."""
    assert isinstance(error, asyncsave.WriteError), repr(error)
    assert isinstance(error, asyncsave.DiskFullError) == (number in FULL)
    assert error.errno == number
    assert error.path.is_relative_to(directory)
    assert isinstance(error.__cause__, OSError)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def visible(directory: Path) -> list[str]:
    return [name for name in names(directory) if not name.startswith(".")]


# -- saving -----------------------------------------------------------------------------------


@every_errno
def test_every_operation_of_a_save_fails_once(tmp_path: Path, number: int) -> None:
    """One Checkpointer for all: each failed save leaves it as if that had never been."""
    disk = BlindDisk(Faults())
    seen = set()
    with Checkpointer(disk.at(tmp_path), keep_last=2, **SMALL) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step), block=True)
        before, step = held(), 3
        for faults in each_operation(number):
            steps = ckpt.steps()
            disk.faults = faults
            error = error_of(
                functools.partial(ckpt.save, step, state_of(step), files={"a.json": b"{}"})
            )
            disk.faults = Faults()
            assert all_free(ckpt)
            assert held() == before
            committed = ("rename", tmp_path / f"step-{step:09d}")
            done = [(each.kind, each.path) for each in faults.operations[: faults.at]]
            if faults.hit is None:
                assert error is None
            elif faults.hit.kind in ("identity", "link"):
                assert error is None, "then nothing is shared"
            elif committed not in done:
                assert error is not None
                assert_is(error, number, tmp_path)
                assert ckpt.steps() == steps
            elif done[-1] == committed:
                assert faults.hit.kind == "sync_directory"
                assert isinstance(error, asyncsave.CommitError)
                assert ckpt.steps() == [*steps, step]
            else:
                assert error is None, "pruning may fail"
            seen |= {faults.hit.kind} if faults.hit else set()
            for each in ckpt.steps():
                assert_same(ckpt.load(step=each), state_of(each))
            ckpt.save(step + 1, state_of(step + 1), block=True)
            assert_same(ckpt.load(), state_of(step + 1))
            failed = isinstance(error, asyncsave.SaveError)
            assert ckpt.steps() == [step - 1 if failed else step, step + 1]
            step += 2
        steps = ckpt.steps()
    assert seen >= {"create_directory", "lock", "create", "write", "sync", "close", "write_file"}
    assert "exists" in seen
    assert seen >= {"sync_directory", "rename", "list_directory", "is_directory", "remove_tree"}
    # what could not be removed is a hidden leftover that the next run sweeps
    assert names(tmp_path) != visible(tmp_path)
    with Checkpointer(tmp_path):
        pass
    assert names(tmp_path) == [f"step-{each:09d}" for each in steps]
    asyncsave.verify(tmp_path)


def test_short_and_slow_operations_change_nothing(tmp_path: Path) -> None:
    for fault in ("short", "delay"):
        kinds = set()
        for faults in each_operation(fault):
            directory = tmp_path / fault
            place = FaultDisk(faults).at(directory)
            with Checkpointer(place, keep_last=1, **SMALL) as ckpt:
                for step in (1, 2):
                    ckpt.save(step, state_of(step), block=True)
                faults.on = False
                kind = faults.hit.kind if faults.hit else ""
                kinds |= {kind}
                if kind == "read" and fault == "short":
                    # a record that looks cut off: nothing is pruned until it is read whole
                    assert "step-000000002" in names(directory)
                else:
                    assert names(directory) == ["step-000000002"]
                ckpt.save(3, state_of(3), block=True)
            assert names(directory) == ["step-000000003"]
            assert_same(asyncsave.load(directory), state_of(3))
            asyncsave.verify(directory)
            shutil.rmtree(directory)
        assert kinds >= {"write", "read"}


def test_short_writes_of_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    written: list[str] = []

    def opened(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if mode != "xb":
            return real(path, mode, *more, **options)
        written.append(Path(path).name)
        return Short(path, "x")

    real = builtins.open
    monkeypatch.setattr(builtins, "open", opened)
    asyncsave.save(state_of(1), tmp_path / "a").result()
    assert written == ["rank-00000.json", "checkpoint.json"]
    assert_same(asyncsave.load(tmp_path / "a"), state_of(1))


@pytest.mark.parametrize("where", [0, 0.3, 1])
@pytest.mark.parametrize("compression", ["off", 1])
def test_a_byte_that_is_flipped_on_its_way_to_the_disk_is_found(
    tmp_path: Path, where: float, compression: Any
) -> None:
    options: dict[str, Any] = {**SMALL, "compression": compression}
    state = {"w": torch.arange(40_001), "s": "text", "step": 2}
    with Checkpointer(tmp_path, **options) as ckpt:
        ckpt.save(1, state_of(1), block=True)
    for faults in each_operation("flip", where=where):
        faults.on = False
        with Checkpointer(FaultDisk(faults).at(tmp_path), **options) as ckpt:
            ckpt.load(keys="step")
            faults.on = True
            ckpt.save(2, state, block=True)
            faults.on = False
            if faults.hit is None or faults.hit.kind == "read":  # of the one it goes on from
                asyncsave.verify(tmp_path)
                assert_same(ckpt.load(), state)
            else:
                with pytest.raises(asyncsave.IntegrityError) as caught:
                    asyncsave.verify(tmp_path)
                assert caught.value.path.name == faults.hit.path.name
                padding = "between its frames" in str(caught.value)
                assert_same(ckpt.load(), state if padding else state_of(1))
                assert len(ckpt.stats.passed_over) == (not padding)
        shutil.rmtree(tmp_path / "step-000000002")


# -- opening, sweeping, pruning ---------------------------------------------------------------


@every_errno
def test_every_operation_of_opening_a_run_fails_once(tmp_path: Path, number: int) -> None:
    before = held()
    for faults in each_operation(number):
        directory = tmp_path / str(faults.at) / "run"
        with Checkpointer(directory, **SMALL) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state_of(step), block=True)
        for name in ("step-000000001", "step-000000003", "step-000000004"):
            shutil.copytree(directory / "step-000000001", hidden(Place(directory / name)))
        try:
            with Checkpointer(FaultDisk(faults).at(directory)) as ckpt:
                faults.on = False
                assert ckpt.steps() == [1, 2]
        except asyncsave.AsyncSaveError as error:
            assert_is(error, number, tmp_path)
        assert held() == before
        with Checkpointer(directory):
            pass
        assert names(directory) == ["step-000000001", "step-000000002"]
        for step in (1, 2):
            assert_same(asyncsave.load(directory / f"step-{step:09d}"), state_of(step))


@every_errno
def test_every_operation_of_making_a_run_fails_once(tmp_path: Path, number: int) -> None:
    for faults in each_operation(number):
        directory = tmp_path / str(faults.at) / "a" / "run"
        try:
            Checkpointer(FaultDisk(faults).at(directory)).close()
        except asyncsave.AsyncSaveError as error:
            assert_is(error, number, tmp_path)
        else:
            # a directory that was there before need not be ours to sync
            refused = faults.hit is not None and number == errno.EACCES
            assert faults.hit is None or (refused and faults.hit.kind == "sync_directory")
        with Checkpointer(directory, **SMALL) as ckpt:
            ckpt.save(1, state_of(1), block=True)
            assert_same(ckpt.load(), state_of(1))


@every_errno
def test_the_best_stays_whatever_fails(tmp_path: Path, number: int) -> None:
    """A run goes on whose best checkpoint is of before: its metrics must be read from the disk."""
    for faults in each_operation(number):
        faults.on = False
        directory = tmp_path / str(faults.at)
        rules: dict[str, Any] = {**SMALL, "keep_best": ("loss", "min")}
        with Checkpointer(directory, **rules) as ckpt:
            ckpt.save(1, state_of(1), metrics={"loss": 1.0}, block=True)
        with Checkpointer(FaultDisk(faults).at(directory), **rules) as ckpt:
            ckpt.load(keys="step")
            faults.on = True
            handle = ckpt.save(2, state_of(2), metrics={"loss": 3.0})
            assert handle is not None
            error = handle.exception()
            faults.on = False
            assert 1 in ckpt.steps()
            assert_same(ckpt.load(step=1), state_of(1))
            assert (2 in ckpt.steps()) == (not isinstance(error, asyncsave.SaveError))
            ckpt.save(3, state_of(3), metrics={"loss": 2.0}, block=True)
            assert ckpt.steps() == [1, 3]


@two_errnos
def test_every_operation_of_setting_a_run_aside_fails_once(tmp_path: Path, number: int) -> None:
    """The first save in another run's directory: nothing of that is lost, and it goes on."""
    for faults in each_operation(number):
        directory = tmp_path / str(faults.at)
        with Checkpointer(directory, **SMALL) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state_of(step), block=True)
        faults.on = False
        place = FaultDisk(faults).at(directory)
        with Checkpointer(place, existing="set_aside", **SMALL) as ckpt:
            faults.on = True
            error = error_of(lambda: ckpt.save(3, state_of(3)))
            faults.on = False
            if error is not None and not isinstance(error, asyncsave.CommitError):
                assert_is(error, number, directory)
            ckpt.save(4, state_of(4), block=True)
            assert ckpt.steps() == [4] if isinstance(error, asyncsave.SaveError) else [3, 4]
            assert_same(ckpt.load(), state_of(4))
        assert all(name.startswith(("step-", "set-aside-")) for name in names(directory))
        aside = sorted(directory.glob("set-aside-*/*"), key=lambda path: path.name)
        assert [path.name for path in aside] == ["step-000000001", "step-000000002"]
        for step, path in enumerate(aside, 1):
            assert_same(asyncsave.load(path), state_of(step))


@two_errnos
def test_every_operation_of_saving_again_after_a_rollback_fails_once(
    tmp_path: Path, number: int
) -> None:
    """What the rollback had left is at the path or what replaces it, whole."""
    for faults in each_operation(number):
        directory = tmp_path / str(faults.at)
        faults.on = False
        with Checkpointer(FaultDisk(faults).at(directory), **SMALL) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step, state_of(step), block=True)
            ckpt.restore(state_of(0), step=1)
            faults.on = True
            error = error_of(lambda: ckpt.save(2, state_of(20)))
            faults.on = False
            failed = error is not None and not isinstance(error, asyncsave.CommitError)
            if error is not None and failed:
                assert_is(error, number, directory)
            path = directory / "step-000000002"
            assert_same(asyncsave.load(path), state_of(2 if failed else 20))
            ckpt.save(2, state_of(21), block=True)
            assert ckpt.steps() == [1, 2]
            assert_same(ckpt.load(), state_of(21))


# -- a single checkpoint ----------------------------------------------------------------------


@every_errno
def test_every_operation_of_overwriting_fails_once(tmp_path: Path, number: int) -> None:
    """After each fault the older one is at the path or the newer one, and nothing else is lost."""
    path = tmp_path / "new" / "a"
    version, before = 1, held()
    asyncsave.save(state_of(1), path, **SMALL).result()
    seen: set[str] = set()
    for faults in each_operation(number):
        shutil.copytree(path, hidden(Place(path)))  # to be swept
        place = FaultDisk(faults).at(path)
        new = functools.partial(asyncsave.save, state_of(version + 1), place, **SMALL)
        error = error_of(functools.partial(new, overwrite=True))
        assert eventually(lambda: held() == before)  # its threads end after the handle
        seen |= {faults.hit.kind} if faults.hit else set()
        if isinstance(error, asyncsave.CommitError):
            (old,) = path.parent.glob(".a.*")  # what was replaced stays: it may be needed again
            assert_same(asyncsave.load(old), state_of(version))
        elif error is not None:
            assert_is(error, number, tmp_path)
        version += error is None or isinstance(error, asyncsave.CommitError)
        assert visible(path.parent) == ["a"]
        assert_same(asyncsave.load(path), state_of(version))
        version += 1
        asyncsave.save(state_of(version), path, overwrite=True, **SMALL).result()
        assert names(path.parent) == ["a"]
        assert_same(asyncsave.load(path), state_of(version))
    assert seen >= {"sync_directory", "exchange", "remove_tree", "list_directory", "is_directory"}


# -- loading ----------------------------------------------------------------------------------


class Object:
    """Loads by itself."""

    def __init__(self, value: int) -> None:
        self.value = torch.full((100,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"].clone()


def live(step: int) -> dict[str, Any]:
    return {
        "model": {"w": state_of(step)["w"], "b": state_of(step)["w"][:1000].reshape(10, 100).T},
        "object": Object(step),
        "step": step,
        "losses": [float(step)] * step,
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "object": state["object"].state_dict()}


@pytest.mark.parametrize("fault", [errno.EIO, errno.EACCES, errno.EMFILE, "flip", "short"])
@pytest.mark.parametrize("steps", [(1,), (1, 2)], ids=["alone", "two"])
def test_every_operation_of_a_restore_misbehaves_once(
    tmp_path: Path, fault: Fault, steps: tuple[int, ...]
) -> None:
    """Whatever it is: an error and the state as it was, or the state of a checkpoint."""
    with Checkpointer(tmp_path, **SMALL) as ckpt:
        for step in steps:
            ckpt.save(step, live(step), block=True)
    before = held()
    outcomes = set()
    for faults in each_operation(fault):
        state = live(7)
        restored: int | None = None
        try:
            restored = asyncsave.restore(FaultDisk(faults).at(tmp_path), state)
            assert restored in steps
        except asyncsave.LoadError:
            assert faults.hit is not None
        assert_same(plain(state), plain(live(restored or 7)))
        if faults.hit is not None and faults.hit.kind == "open" and fault != errno.EIO:
            # it may be sound: going on from an older one would lose work
            assert restored in (None, steps[-1])
        outcomes.add(restored)
        assert held() == before
    assert steps[-1] in outcomes


@pytest.mark.parametrize("fault", [errno.EIO, errno.EACCES, errno.EMFILE, "flip", "short"])
def test_every_operation_of_verify_misbehaves_once(tmp_path: Path, fault: Fault) -> None:
    with Checkpointer(tmp_path, **SMALL) as ckpt:
        ckpt.save(1, live(1), block=True)
    before = held()
    for faults in each_operation(fault):
        try:
            asyncsave.verify(FaultDisk(faults).at(tmp_path))
            assert faults.hit is None
        except asyncsave.LoadError:
            assert faults.hit is not None
        assert held() == before


LOOKS: dict[str, Callable[[Checkpointer], object]] = {
    "load": lambda ckpt: ckpt.load()["step"] == 2,
    "load a part": lambda ckpt: ckpt.load(step=1, keys="step") == {"step": 1},
    "restore": lambda ckpt: ckpt.restore({"w": torch.zeros(40_000), "step": 0}) == 2,
    "steps": lambda ckpt: ckpt.steps() == [1, 2],
    "checkpoints": lambda ckpt: [each.step for each in ckpt.checkpoints()] == [1, 2],
}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("look", LOOKS)
def test_every_operation_of_a_look_into_a_run_fails_once(
    tmp_path: Path, look: str, number: int
) -> None:
    """It is a LoadError that says what it is, or was not needed; and the run goes on."""
    with Checkpointer(tmp_path, **SMALL) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step), block=True)
    for faults in each_operation(number):
        faults.on = False
        with Checkpointer(FaultDisk(faults).at(tmp_path), **SMALL) as ckpt:
            before = held()
            faults.on = True
            right: object = None
            error: asyncsave.LoadError | None = None
            try:
                right = LOOKS[look](ckpt)
            except asyncsave.LoadError as caught:
                error = caught
            faults.on = False
            if error is not None:
                assert faults.hit is not None
                damage = number == errno.EIO and faults.hit.kind in ("open", "read")
                assert isinstance(error, asyncsave.IntegrityError) == damage, repr(error)
                assert isinstance(error.__cause__, OSError)
            elif not right:  # it seemed to be damage: the one before was taken, and that was said
                assert number == errno.EIO
                assert [path.name for path, _ in ckpt.stats.passed_over] == ["step-000000002"]
            assert held() == before
            assert LOOKS[look](ckpt)


# -- single cases -----------------------------------------------------------------------------


def test_the_commit_is_in_order(tmp_path: Path) -> None:
    faults = Faults()
    with Checkpointer(FaultDisk(faults).at(tmp_path / "order"), keep_last=1) as ckpt:
        ckpt.save(1, {"w": torch.ones(10)}, block=True)
        ckpt.save(2, {"w": torch.zeros(10)}, block=True)
    once = [
        *("create_directory", "create", "write", "sync", "close"),
        *("write_file", "write_file", "sync_directory", "rename", "sync_directory"),
    ]
    prune = ["rename", "sync_directory", "remove_tree"]
    operations = [
        each.kind
        for each in faults.operations
        if each.kind not in ("lock", "list_directory", "is_directory", "exists", "open", "read")
        and each.kind != "identity"
        and (each.kind, each.path.name) != ("create_directory", "order")
        and not (each.kind == "sync_directory" and each.path in (tmp_path, tmp_path.parent))
    ]
    second = [*once[:2], "link", "write", "remove_file", *once[3:]]
    assert operations == [*once, *second, *prune]


class BuggyDisk(WrappedDisk):
    """Its files raise what no disk should, while ``broken``."""

    broken = False

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        file = await super().create(path, executor)
        return BuggyFile(file) if self.broken else file


class BuggyFile(WrappedFile):
    async def write(self, view: memoryview) -> int:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("where", ["the encoder", "the disk"])
def test_an_error_that_is_a_bug_is_still_a_save_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    disk = BuggyDisk()
    with Checkpointer(disk.at(tmp_path), compression=1) as ckpt:
        ckpt.save(1, state_of(1), block=True)
        with monkeypatch.context() as patch:
            if where == "the encoder":
                patch.setattr(xxhash, "xxh3_128", broken)  # the first thing it calls
            disk.broken = where == "the disk"
            handle = ckpt.save(2, state_of(2))
            assert handle is not None
            with pytest.raises(asyncsave.SaveError, match="a bug") as caught:
                handle.result()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            disk.broken = False
        assert all_free(ckpt)
        ckpt.save(2, state_of(2), block=True)
        assert ckpt.steps() == [1, 2]


def test_failing_while_the_stager_waits_for_memory(tmp_path: Path) -> None:
    """The state is larger than the memory, so the training thread waits when the disk fails."""
    faults = Faults(fault=errno.ENOSPC)
    state = {"w": torch.randn(8 << 20)}
    place = FaultDisk(faults).at(tmp_path)
    with Checkpointer(place, compression="off", memory_limit=4 << 20, reuse="off") as ckpt:
        ckpt.save(1, state, block=True)
        faults.at = len(faults.operations) + 4
        handle = ckpt.save(2, state)
        assert handle is not None
        with pytest.raises(asyncsave.DiskFullError, match="keep fewer checkpoints"):
            handle.result()
        assert faults.hit is not None
        assert faults.hit.kind == "write"
        faults.at = -1
        ckpt.save(3, state, block=True)
        assert ckpt.steps() == [1, 3]


def test_a_failed_copy_is_a_staging_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:

            def broken(*_: Any) -> Any:
                raise RuntimeError("device-side assert")

            patch.setattr(torch, "_foreach_copy_", broken)
            with pytest.raises(asyncsave.StagingError, match="device-side assert"):
                ckpt.save(1, state_of(1))
        ckpt.save(2, state_of(2), block=True)
        assert ckpt.steps() == [2]
        assert ckpt.stats.failures == 1
