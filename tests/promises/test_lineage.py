"""Lineage: which checkpoint is the newest, through rollbacks, crashes, damage and fresh starts."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import asyncsave
from asyncsave import Checkpointer
from asyncsave.format.lineage import Lineage
from asyncsave.reading.newest import forget_loaded
from asyncsave.storage.place import PathLike
from tests.doubles.disks import AskingDisk
from tests.rooms.test_restore import damage


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((64,), float(step)), "step": step}


def make(directory: PathLike, **options: Any) -> Checkpointer:
    return Checkpointer(directory, **{"durable": False, "signals": (), **options})


def save(directory: Path, *steps: int, back_to: int | None = None, **options: Any) -> list[int]:
    """Go on from the newest checkpoint, or from that of a step; return what is there then."""
    with make(directory, **options) as ckpt:
        ckpt.restore(state_of(0), step=back_to)
        for step in steps:
            ckpt.save(step, state_of(step), block=True)
        return ckpt.steps()


def newest(directory: Path) -> int:
    """Return the step that every reader takes for the newest, and assert that they agree."""
    with make(directory) as ckpt:
        into = state_of(0)
        step = ckpt.restore(into)
        assert step is not None
        assert into["step"] == step
        assert ckpt.latest_step() == ckpt.steps()[-1] == step
        assert ckpt.load()["step"] == step
        infos = ckpt.checkpoints()
    assert asyncsave.load(directory)["step"] == step
    assert asyncsave.restore(directory, into) == step
    assert asyncsave.verify(directory).newest.name == f"step-{step:09d}"
    assert [info.step for info in infos if info.newest] == [step]
    assert infos == asyncsave.checkpoints(directory)
    return step


# -- rollbacks ------------------------------------------------------------------------------------


def test_a_rollback_stays_rolled_back(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    assert save(tmp_path, back_to=10) == [10, 20, 30], "restoring alone changes nothing"
    assert newest(tmp_path) == 30
    assert save(tmp_path, 15, 25, back_to=10) == [10, 15, 25]
    assert newest(tmp_path) == 25
    left = [info.step for info in asyncsave.checkpoints(tmp_path) if info.left]
    assert left == [20, 30]
    assert asyncsave.load(tmp_path / "step-000000030")["step"] == 30, "who asks for it gets it"
    assert save(tmp_path, 35) == [10, 15, 25, 35]
    assert newest(tmp_path) == 35


def test_a_rollback_is_taken_back(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15, back_to=10)
    assert save(tmp_path, 40, back_to=30) == [10, 20, 30, 40]
    assert newest(tmp_path) == 40
    assert [info.step for info in asyncsave.checkpoints(tmp_path) if info.left] == [15]


def test_a_step_that_was_left_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, 20, 30)
    assert save(tmp_path, 20, back_to=10) == [10, 20]
    assert "replacing" in caplog.text
    assert newest(tmp_path) == 20
    with make(tmp_path) as ckpt:
        ckpt.restore(state_of(0))
        ckpt.save(30, state_of(31), block=True)
        assert ckpt.load(step=30)["step"] == 31
        with pytest.raises(asyncsave.CheckpointExistsError, match=r"this run came from it"):
            ckpt.save(10, state_of(10))


def test_what_was_left_ages_out(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    options = {"keep_last": 3}

    def there() -> list[int]:
        return [info.step for info in asyncsave.checkpoints(tmp_path) if info.step is not None]

    save(tmp_path, 15, back_to=10, **options)
    assert there() == [10, 20, 30, 15], "a rollback by mistake can be taken back for a while"
    save(tmp_path, 25, **options)
    assert there() == [10, 30, 15, 25]
    save(tmp_path, 35, **options)
    assert there() == [15, 25, 35]


def test_what_was_left_is_not_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_best": ("loss", "min")}
    with make(tmp_path, **options) as ckpt:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            ckpt.save(step, state_of(step), metrics={"loss": loss})
        ckpt.wait()
        assert ckpt.best_step() == 20
        assert ckpt.steps() == [20, 30]
    with make(tmp_path, **options) as ckpt:
        assert ckpt.restore(state_of(0), step=30) == 30
        ckpt.save(40, state_of(40), metrics={"loss": 5.0}, block=True)
        assert ckpt.steps() == [20, 40]
    with make(tmp_path, **options) as ckpt:
        into = state_of(0)
        assert ckpt.restore(into, step="best") == 20
        assert into["step"] == 20
        ckpt.save(21, state_of(21), metrics={"loss": 9.0}, block=True)
        assert ckpt.steps() == [20, 21]
        assert ckpt.best_step() == 20


def test_damage_never_brings_back_what_was_left(tmp_path: Path) -> None:
    for file in ("rank-00000.data", "rank-00000.json", "checkpoint.json"):
        run = tmp_path / file
        save(run, 10, 20, 30)
        save(run, 15, back_to=10)
        damage(run / "step-000000015" / file)
        into = state_of(0)
        assert asyncsave.restore(run, into) == 10
        assert asyncsave.load(run)["step"] == into["step"] == 10
        save(run, 17)
        assert newest_of(run) == 17


def newest_of(run: Path) -> int:
    """As `newest`, where others are damaged and `verify` raises."""
    with make(run) as ckpt:
        step = ckpt.restore(state_of(0))
        assert step is not None
        assert asyncsave.load(run)["step"] == step
    return step


def test_the_damage_of_an_older_one_hides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15, 25, back_to=10)
    for step in (15, 20):
        damage(tmp_path / f"step-{step:09d}" / "checkpoint.json")
    assert newest_of(tmp_path) == 25
    assert "was taken for an older one" in caplog.text
    assert save(tmp_path, 40)[-1] == 40
    assert newest_of(tmp_path) == 40


def test_damage_costs_no_sound_one_its_place(tmp_path: Path) -> None:
    """A damaged one of a later step does not count as the newest, which keep_last would keep."""
    options = {"keep_last": 1}
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "step-000000030" / "checkpoint.json")
    for step in (25, 27, 40):
        save(tmp_path, step, **options)
        assert newest_of(tmp_path) == step
        assert asyncsave.load(tmp_path)["step"] == step
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000000030", "step-000000040"], "what cannot be read is not pruned"


def test_a_record_that_cannot_be_read_for_a_moment_is_not_pruned(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    unreadable = {"step-000000010", "step-000000030"}

    def refuse(what: str, path: Path) -> None:
        if what == "open" and path.parent.name in unreadable:
            raise OSError(24, "Too many open files")

    with make(AskingDisk(refuse).at(tmp_path), keep_last=1) as ckpt:
        ckpt.load()
        ckpt.save(30, state_of(30), block=True)
        unreadable.clear()
        assert ckpt.steps() == [10, 20, 30]
        assert asyncsave.load(tmp_path)["step"] == 30
        ckpt.save(40, state_of(40), block=True)
        assert ckpt.steps() == [40]


@pytest.mark.parametrize("what", ["an empty directory", "a copy"])
@pytest.mark.parametrize("step", [15, 99])
def test_a_stray_directory_displaces_nothing(tmp_path: Path, what: str, step: int) -> None:
    save(tmp_path, 10, 20, 30)
    stray = tmp_path / f"step-{step:09d}"
    if what == "a copy":
        shutil.copytree(tmp_path / "step-000000020", stray)
    else:
        stray.mkdir()
    assert newest_of(tmp_path) == 30
    for each in (40, 50):
        save(tmp_path, each, keep_last=1)
        assert newest_of(tmp_path) == each
    assert stray.exists()


def test_one_of_another_run_that_is_copied_in_costs_none_of_the_runs_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "other", *range(1, 11))
    with make(tmp_path / "run", keep_last=1) as ckpt:
        ckpt.save(2, state_of(2), block=True)
        shutil.copytree(tmp_path / "other" / "step-000000010", tmp_path / "run" / "step-000000010")
        ckpt.save(3, state_of(3), block=True)
        assert "nothing is pruned" in caplog.text
        ckpt.save(4, state_of(4), block=True)
        assert ckpt.latest_step() == 4
        assert ckpt.load()["step"] == 4


def test_a_single_save_keeps_the_place_of_what_it_overwrites(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    asyncsave.save(state_of(31), tmp_path / "step-000000030", overwrite=True).result()
    assert asyncsave.load(tmp_path)["step"] == 31
    with pytest.raises(asyncsave.ConfigError, match="directory of a run"):
        asyncsave.save(state_of(40), tmp_path / "step-000000040")
    asyncsave.save(state_of(40), tmp_path / "best").result()
    assert save(tmp_path, 50) == [10, 20, 30, 50]


def test_a_checkpoint_is_no_directory_of_a_run(tmp_path: Path) -> None:
    asyncsave.save(state_of(1), tmp_path / "a").result()
    with pytest.raises(asyncsave.ConfigError, match="is a checkpoint itself"):
        make(tmp_path / "a")


def test_a_part_of_an_older_one_is_no_rollback(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    with make(tmp_path) as ckpt:
        ckpt.restore(state_of(0))
        ckpt.restore(state_of(0), step=10, keys="w")
        ckpt.save(30, state_of(30), block=True)
        assert ckpt.steps() == [10, 20, 30]


def test_a_run_that_was_resumed_at_a_lower_step_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved out of order, it is told of; and a restart must not end at the later step each time."""
    with make(tmp_path) as ckpt:
        for step in (100, 200, 300, 250):
            ckpt.save(step, state_of(step), block=True)
    assert "step 250 is saved after step 300" in caplog.text
    with make(tmp_path) as ckpt:
        assert ckpt.restore(state_of(0)) == 250
        ckpt.save(300, state_of(301), block=True)
        ckpt.save(350, state_of(350), block=True)
        assert ckpt.load(step=300)["step"] == 301
        assert ckpt.latest_step() == 350


def test_a_report_that_raises_does_not_undo_the_rollback(tmp_path: Path) -> None:
    def report(_: Any) -> None:
        raise ZeroDivisionError

    save(tmp_path, 10, 20)
    with make(tmp_path) as ckpt:
        with pytest.raises(ZeroDivisionError):
            ckpt.restore(state_of(0), step=10, report=report)
        ckpt.save(15, state_of(15), block=True)
    assert newest(tmp_path) == 15


def test_a_mount_that_is_stale_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)

    def stale(what: str, path: Path) -> None:
        if what == "open" and path.parent.name == "step-000000020":
            raise OSError(116, "Stale file handle", str(path))

    with pytest.raises(asyncsave.LoadError, match="Stale") as caught:
        asyncsave.load(AskingDisk(stale).at(tmp_path))
    assert not isinstance(caught.value, asyncsave.IntegrityError)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_looked_at_may_be_the_newest(tmp_path: Path, error: int) -> None:
    """A directory that may not be entered, or cannot be: going on before it would lose work."""
    save(tmp_path, 10, 20)

    def refuse(what: str, path: Path) -> None:
        if path.parent.name == "step-000000020":
            raise OSError(error, os.strerror(error), str(path))

    place, into = AskingDisk(refuse).at(tmp_path), state_of(0)
    with pytest.raises(asyncsave.LoadError, match=os.strerror(error)) as caught:
        asyncsave.restore(place, into)
    assert type(caught.value) is asyncsave.LoadError
    assert into["step"] == 0
    with pytest.raises(asyncsave.LoadError, match="1 of 2") as caught:
        asyncsave.verify(place)
    assert "restore() would take none of them" in str(caught.value.__notes__)
    assert [info.sound for info in asyncsave.checkpoints(place)] == [None, False]
    assert newest(tmp_path) == 20


def test_all_of_the_line_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    save(tmp_path, 15, back_to=10)
    for step in (10, 15):
        damage(tmp_path / f"step-{step:09d}" / "rank-00000.data")
    with pytest.raises(asyncsave.IntegrityError) as caught:
        asyncsave.load(tmp_path)
    assert "a rollback had left them: step 20" in caught.value.__notes__[-1]


def test_one_that_was_saved_by_itself_is_older(tmp_path: Path) -> None:
    asyncsave.save(state_of(50), tmp_path / "step-000000050").result()
    assert asyncsave.load(tmp_path)["step"] == 50
    with make(tmp_path) as ckpt:
        ckpt.load()
        ckpt.save(60, state_of(60), block=True)
        assert ckpt.steps() == [50, 60]
    assert newest_of(tmp_path) == 60


# -- fresh starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["save", "step", "a step that is not due"])
def test_a_used_directory_is_refused_at_once(tmp_path: Path, first: str) -> None:
    save(tmp_path, 10, 20)
    with make(tmp_path, every_steps=5) as ckpt:
        begin = {
            "save": lambda: ckpt.save(30, state_of(30)),
            "step": lambda: ckpt.step(5, state_of(5)),
            "a step that is not due": lambda: ckpt.step(1, state_of(1)),
        }[first]
        with pytest.raises(asyncsave.CheckpointExistsError, match=r"10, 20.*set_aside"):
            begin()
        assert ckpt.steps() == [10, 20]
        ckpt.restore(state_of(0))
        ckpt.save(30, state_of(30))


def test_an_earlier_run_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save(tmp_path, 10, 20)
    with make(tmp_path, every_steps=5, existing="set_aside") as ckpt:
        ckpt.step(1, state_of(1))
        assert ckpt.steps() == [10, 20], "not before there is something to save"
        ckpt.step(5, state_of(5))
        ckpt.wait()
        assert ckpt.steps() == [5]
        ckpt.step(10, state_of(10))
        ckpt.wait()
        assert ckpt.steps() == [5, 10]
    (folder,) = tmp_path.glob("set-aside-*")
    assert "set 2 checkpoints of an earlier run aside" in caplog.text
    assert newest(folder) == 20
    assert newest(tmp_path) == 10
    with make(tmp_path, existing="set_aside") as ckpt:
        assert ckpt.restore(state_of(0)) == 10, "who restores sets nothing aside"
        ckpt.save(12, state_of(12), block=True)
        assert ckpt.steps() == [5, 10, 12]


def test_weights_are_taken_from_a_run_that_is_then_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    with make(tmp_path, existing="set_aside") as ckpt:
        assert ckpt.load(keys="w")["w"][0] == 20
        ckpt.save(5, state_of(5), block=True)
        assert ckpt.steps() == [5]


def test_setting_aside_that_is_cut_off(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    moved: list[str] = []

    def ask(what: str, path: Path) -> None:
        if what != "rename":
            return
        if len(moved) == 2:
            raise OSError(5, "the disk is gone")
        moved.append(path.name)

    with make(AskingDisk(ask).at(tmp_path), existing="set_aside") as ckpt:
        with pytest.raises(asyncsave.WriteError, match="set-aside") as caught:
            ckpt.save(5, state_of(5))
        assert caught.value.errno == 5
    assert moved == ["step-000000010", "step-000000020"]
    assert newest(tmp_path) == 30, "the newest is the last to go"


@pytest.mark.parametrize(
    "how", ["restore", "load", "asyncsave.load", "asyncsave.restore", "asyncsave.numpy.load"]
)
def test_loading_counts(tmp_path: Path, how: str) -> None:
    """Load, evaluate, and save at the step that was resumed from."""
    save(tmp_path, 10, 20)
    with make(tmp_path, every_steps=10) as ckpt:
        into = state_of(0)
        match how:
            case "restore":
                ckpt.restore(into)
            case "load":
                ckpt.load()
            case "asyncsave.load":
                asyncsave.load(tmp_path)
            case "asyncsave.numpy.load":
                asyncsave.numpy.load(tmp_path)
            case _:
                asyncsave.restore(tmp_path, into)
        ckpt.step(20, state_of(21), metrics={"loss": 1.0})
        ckpt.wait()
        assert ckpt.load(step=20)["step"] == 21
        ckpt.step(30, state_of(30))
        ckpt.save(30, state_of(31), block=True)  # and once more at the end
        assert ckpt.steps() == [10, 20, 30]
    assert not [info for info in asyncsave.checkpoints(tmp_path) if info.left]
    with make(tmp_path) as ckpt:
        assert ckpt.load()["step"] == 31


@pytest.mark.parametrize("how", ["tune", "verify"])
def test_measuring_a_run_is_not_going_on_with_it(tmp_path: Path, how: str) -> None:
    save(tmp_path, 10, 20)
    if how == "tune":
        asyncsave.tune(tmp_path, levels=[0], seconds=0.1)
    else:
        asyncsave.verify(tmp_path)
    with make(tmp_path) as ckpt, pytest.raises(asyncsave.CheckpointExistsError):
        ckpt.save(30, state_of(30), block=True)
    assert newest(tmp_path) == 20


def test_a_look_at_an_older_one_is_no_rollback(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    with make(tmp_path) as ckpt:
        ckpt.load(step=10)
        ckpt.load()
        ckpt.load(step=20, keys="w")
        ckpt.save(40, state_of(40), block=True)
        assert ckpt.steps() == [10, 20, 30, 40]
        ckpt.load(step=10)
        ckpt.save(50, state_of(50), block=True)
        assert ckpt.steps() == [10, 20, 30, 40, 50]


def test_loading_an_older_one_and_going_on_there_is_a_rollback(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    with make(tmp_path) as ckpt:
        ckpt.load(step=10)
        ckpt.save(15, state_of(15), block=True)
    assert newest(tmp_path) == 15


@pytest.mark.parametrize("how", ["restore", "load"])
def test_a_loop_that_begins_anew_after_restoring_is_told(tmp_path: Path, how: str) -> None:
    save(tmp_path, 10, 20)
    with make(tmp_path, every_steps=10) as ckpt:
        ckpt.restore(state_of(0)) if how == "restore" else ckpt.load()
        with pytest.raises(
            asyncsave.ConfigError, match=r"step 1, but the run goes on from step 20"
        ):
            ckpt.step(1, state_of(1))
        with pytest.raises(asyncsave.ConfigError, match=r"restore\(\) returns"):
            ckpt.save(10, state_of(1))
        assert ckpt.steps() == [10, 20]
        ckpt.step(21, state_of(21))
        ckpt.step(30, state_of(30))


def test_a_save_that_fails_is_no_step_of_the_line(tmp_path: Path) -> None:
    save(tmp_path / "run", 10)
    with make(tmp_path / "run") as ckpt:
        ckpt.restore(state_of(0))
        (tmp_path / "run").rename(tmp_path / "moved")
        handle = ckpt.save(20, state_of(20))
        assert handle is not None
        assert isinstance(handle.exception(), asyncsave.SaveError)
        (tmp_path / "moved").rename(tmp_path / "run")
        ckpt.save(20, state_of(20), block=True)
        ckpt.save(30, state_of(30), block=True)
        assert ckpt.steps() == [10, 20, 30]
    assert newest(tmp_path / "run") == 30


def test_one_that_is_in_place_but_not_known_to_be_durable_is_the_last_one(tmp_path: Path) -> None:
    is_broken = False

    def ask(what: str, path: Path) -> None:
        if is_broken and what == "sync_directory" and path == tmp_path:
            raise OSError(5, "no")

    with Checkpointer(AskingDisk(ask).at(tmp_path)) as ckpt:
        ckpt.save(10, state_of(10), block=True)
        is_broken = True
        handle = ckpt.save(20, state_of(20))
        assert handle is not None
        assert isinstance(handle.exception(), asyncsave.CommitError)
        is_broken = False
        ckpt.restore(state_of(0), step=10)
        ckpt.save(15, state_of(15), block=True)
        assert ckpt.steps() == [10, 15], "a rollback from it is one"
        ckpt.restore(state_of(0), step=20)
        ckpt.save(20, state_of(21), block=True)
        ckpt.save(30, state_of(30), block=True)
        assert ckpt.steps() == [10, 20, 30]


# -- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lineage", "possible"),
    [
        (Lineage(), True),
        (Lineage(1), True),
        (Lineage(4, 1, ((2, 3),)), True),
        (Lineage(9, 8, ((2, 3), (5, 5))), True),
        (Lineage(-1), False),
        (Lineage(2**53), False),
        (Lineage(1, 1), False),
        (Lineage(3, 0), False),
        (Lineage(4, 1, ((3, 2),)), False),
        (Lineage(4, 1, ((0, 2),)), False),
        (Lineage(4, 1, ((2, 4),)), False),
        (Lineage(9, 8, ((5, 5), (2, 3))), False),
        (Lineage(9, 8, ((2, 5), (5, 6))), False),
    ],
    ids=str,
)
def test_which_lineages_can_be(lineage: Lineage, possible: bool) -> None:
    assert lineage.is_possible == possible


def test_ranges_are_joined() -> None:
    first = Lineage(1)
    back = first.next(3)  # 2 and 3 are left
    assert back == Lineage(4, 1, ((2, 3),))
    again = first.next(4)  # and 4, too
    assert again == Lineage(5, 1, ((2, 4),))
    assert again.next(5) == Lineage(6, 5, ((2, 4),))
    assert [back.came_from(serial) for serial in range(1, 6)] == [True, False, False, True, False]
    assert back.next(7) == Lineage(8, 4, ((2, 3), (5, 7)))


# -- a model of what a person expects -------------------------------------------------------------


@dataclass
class Saved:
    """A checkpoint as a person remembers it: its step, its state, and what it came from."""

    step: int
    mark: int
    before: Saved | None = None

    def line(self) -> list[Saved]:
        return [self, *(self.before.line() if self.before else [])]


@dataclass
class Model:
    """What a person expects of a directory. ``order``: all that was committed, oldest first."""

    order: list[Saved] = field(default_factory=list)

    def head(self) -> Saved | None:
        return self.order[-1] if self.order else None

    def of(self, step: int) -> Saved:
        return next(each for each in self.order if each.step == step)


class Runs(RuleBasedStateMachine):
    """Runs begin, restore, save, are killed; and what comes back is what a person expects."""

    keep_last: int | None = None

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="lineage-"))
        self.run = self.folder / "run"
        self.model = Model()
        self.place = AskingDisk(self._ask).at(self.run)
        self.hides = True
        self.at: Saved | None = None  # what the running process goes on from
        self.ckpt: Checkpointer | None = None
        self.marks = 0

    def teardown(self) -> None:
        if self.ckpt is not None:
            self.ckpt.close()
        shutil.rmtree(self.folder)

    def _ask(self, what: str, path: Path) -> None:
        if what == "rename" and path.name.startswith(".") and not self.hides:
            raise OSError(5, "a checkpoint is hidden before it is removed: not now")

    # -- processes

    @precondition(lambda self: self.ckpt is None)
    @rule()
    def resumes(self) -> None:
        self.ckpt = make(self.place, keep_last=self.keep_last)
        into = {"mark": 0}
        step = self.ckpt.restore(into)
        self.at = self.model.head()
        assert step == (self.at.step if self.at else None)
        assert into["mark"] == (self.at.mark if self.at else 0)

    @precondition(lambda self: self.ckpt is None and len(self.model.order) > 1)
    @rule(data=st.data(), loads=st.booleans())
    def goes_back(self, data: st.DataObject, loads: bool) -> None:
        self.ckpt = make(self.place, keep_last=self.keep_last)
        there = data.draw(st.sampled_from(self.model.order))
        if loads:
            assert self.ckpt.load(step=there.step)["mark"] == there.mark
        else:
            into = {"mark": 0}
            assert self.ckpt.restore(into, step=there.step) == there.step
            assert into["mark"] == there.mark
        self.at = there

    @precondition(lambda self: self.ckpt is None and self.model.order)
    @rule(aside=st.booleans(), step=st.integers(0, 6))
    def begins_anew(self, aside: bool, step: int) -> None:
        self.ckpt = make(
            self.place, keep_last=self.keep_last, existing="set_aside" if aside else "refuse"
        )
        if aside:
            self.model.order.clear()
            self.at = None
            self._save(step)
            return
        with pytest.raises(asyncsave.CheckpointExistsError):
            self.ckpt.save(step, {"mark": -1})
        self.ends()

    @precondition(lambda self: self.ckpt is not None)
    @rule()
    def ends(self) -> None:
        assert self.ckpt is not None
        self.ckpt.close()
        self.ckpt = None
        forget_loaded(self.run)  # as a new process knows nothing of it

    # -- saves

    @precondition(lambda self: self.ckpt is not None)
    @rule(ahead=st.integers(0, 3))
    def saves(self, ahead: int) -> None:
        self._save((self.at.step if self.at else 0) + ahead)

    @precondition(lambda self: self.ckpt is not None)
    @rule(ahead=st.integers(1, 3), point=st.sampled_from(["create", "rename"]))
    def is_killed_while_saving(self, ahead: int, point: str) -> None:
        """Leave what a kill leaves: a draft that is never renamed, or one that just was."""
        assert self.ckpt is not None
        if point == "rename":
            # the commit was the last thing that happened: nothing was pruned after it
            self.hides = False
            self._save((self.at.step if self.at else 0) + ahead, prunes=False)
            self.hides = True
        else:
            (self.run / f".step-{ahead:09d}.0123456789abcdef").mkdir()
        self.ends()

    def _save(self, step: int, *, prunes: bool = True) -> None:
        assert self.ckpt is not None
        self.marks += 1
        ancestors = [each.step for each in self.at.line()] if self.at else []
        if step in ancestors[1:]:
            with pytest.raises((asyncsave.CheckpointExistsError, asyncsave.ConfigError)):
                self.ckpt.save(step, {"mark": self.marks})
            return
        self.ckpt.save(step, {"mark": self.marks}, block=True)
        before = self.at
        if before is not None and before.step == step:
            before = before.before
        new = Saved(step, self.marks, before)
        self.model.order = [each for each in self.model.order if each.step != step] + [new]
        self.at = new
        if self.keep_last is not None and prunes:
            line = [each for each in new.line() if each in self.model.order]
            keep = line[: self.keep_last] + self.model.order[-self.keep_last :]
            self.model.order = [each for each in self.model.order if each in keep]

    # -- what is there

    @invariant()
    def it_is_what_a_person_expects(self) -> None:
        if not self.run.exists():
            return
        head = self.model.head()
        if head is None:
            return
        look = self.folder / "look"  # elsewhere, as this look is nothing that the run does
        shutil.copytree(self.run, look, copy_function=os.link)
        assert asyncsave.load(look) == {"mark": head.mark}
        infos = asyncsave.checkpoints(look)
        assert [info.step for info in infos] == [each.step for each in self.model.order]
        line = head.line()
        assert {info.step for info in infos if not info.left} == {
            each.step for each in self.model.order if each in line
        }
        assert asyncsave.verify(look).newest.name == f"step-{head.step:09d}"
        forget_loaded(look)
        shutil.rmtree(look)


class PrunedRuns(Runs):
    keep_last = 2


FEW = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=300, stateful_step_count=30)

TestRuns = Runs.TestCase
TestRuns.settings = FEW
TestPrunedRuns = PrunedRuns.TestCase
TestPrunedRuns.settings = FEW


@pytest.mark.slow
@pytest.mark.parametrize("runs", [Runs, PrunedRuns])
def test_many_runs(runs: type[Runs]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(runs, settings=MANY)
