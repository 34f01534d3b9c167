"""A power cut at any moment: what was reported durable is there, and the next run goes on from it.

Every run is recorded (crash_disk.py). Then, after each single change to the disk, images of what a
power cut would leave are made into directories, opened by a reader, and a next run goes on there.
All that happens in this process, and for a few images in fresh ones.

The mutants at the end are commits with one step left out or misplaced; they show that the harness
would notice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.format.files import CHECKPOINT_FILE, rank_file
from asyncsave.storage.disk import WritableFile
from asyncsave.storage.place import Place
from asyncsave.storage.steps import list_steps, prune
from tests import children, counts
from tests.doubles.crash_disk import (
    CrashDisk,
    Event,
    Keep,
    Log,
    Platter,
    Tree,
    fingerprint,
    write_image,
)
from tests.doubles.disks import WrappedDisk, WrappedFile
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import assert_same

SMALL: dict[str, Any] = {"compression": "off", "memory_limit": 180 << 10}  # three chunks
KEEP = 2
CERTAIN: tuple[Keep, ...] = ("nothing", "everything", "names", "data")


def state_of(step: int) -> dict[str, Any]:
    """Return a state of three chunks, two of which are the same in all steps: a run links them."""
    changed = torch.randn(4_000, generator=torch.Generator().manual_seed(step))
    return {"w": torch.cat([torch.arange(36_000.0), changed]), "step": step}


def beside(step: int) -> dict[str, bytes]:
    """What is saved beside it; that it is whole, too, `verify` says."""
    return {"config.json": f'{{"step": {step}}}'.encode()}


MakeDisk = Callable[[Log], WrappedDisk]
"""Puts a disk together that writes to a log. Faults are below that, and so are logged as they are;
mutants are above it: what they do is what asyncsave would have done."""


# -- what is recorded -------------------------------------------------------------------------


def run(log: Log, steps: int, disk: WrappedDisk) -> None:
    """Save ``steps`` times in a run with retention; go on from what is there."""
    with Checkpointer(disk.at(log.root / "runs" / "a"), keep_last=KEEP, **SMALL) as ckpt:
        start: int = ckpt.load(keys="step")["step"] if ckpt.steps() else 0
        for step in range(start + 1, start + steps + 1):
            ckpt.save(step, state_of(step), files=beside(step), block=True)
            log.note(step)


def overwrite(log: Log, steps: int, disk: WrappedDisk) -> None:
    """Save ``steps`` times to one path, each in place of what is there."""
    path = log.root / "runs" / "a"
    start: int = asyncsave.load(path)["step"] if (path / CHECKPOINT_FILE).exists() else 0
    for step in range(start + 1, start + steps + 1):
        handle = asyncsave.save(
            state_of(step), disk.at(path), files=beside(step), overwrite=True, **SMALL
        )
        handle.result()
        log.note(step)


# -- what must be true of an image ------------------------------------------------------------


def check_run(image: Path, reported: list[int]) -> None:
    """Assert what a run with retention promises; then let the next run go on."""
    directory = image / "runs" / "a"
    present = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
    promised = sorted({*reported, *present})[-KEEP:]
    assert set(promised) <= set(present), f"{promised} were promised, {present} are there"
    for step in present:
        assert_same(asyncsave.load(directory / f"step-{step:09d}"), state_of(step))
    if present:
        chunks = asyncsave.verify(directory).chunks
        assert chunks == 3 * len(present), chunks
        assert_same(asyncsave.load(directory), state_of(present[-1]))
    with Checkpointer(directory, keep_last=KEEP, **SMALL) as ckpt:
        state: dict[str, Any] = {"w": torch.zeros(40_000), "step": 0}
        assert ckpt.restore(state) == (present[-1] if present else None)
        after = state["step"] + 1
        ckpt.save(after, state_of(after), block=True)
        assert_same(ckpt.load(), state_of(after))
    left = [f"step-{step:09d}" for step in [*present, after][-KEEP:]]
    assert sorted(path.name for path in directory.iterdir()) == left


def check_overwrite(image: Path, reported: list[int]) -> None:
    """Assert that one version is there, whole, and none older than the newest reported."""
    path = image / "runs" / "a"
    newest = reported[-1] if reported else 0
    if reported or path.exists():
        version = asyncsave.load(path)["step"]
        assert version >= newest, f"{newest} was reported, {version} is there"
        assert_same(asyncsave.load(path), state_of(version))
        asyncsave.verify(path)
    asyncsave.save(state_of(99), path, overwrite=True, **SMALL).result()
    assert_same(asyncsave.load(path), state_of(99))
    assert [each.name for each in path.parent.iterdir()] == ["a"]


@dataclass(frozen=True)
class Scenario:
    record: Callable[[Log, int, WrappedDisk], None]
    check: Callable[[Path, list[int]], None]


SCENARIOS = {"run": Scenario(run, check_run), "overwrite": Scenario(overwrite, check_overwrite)}
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)


# -- images -----------------------------------------------------------------------------------


def images(
    events: list[Event], root: Path, chance: random.Random, count: int, begin: int = 0
) -> Iterator[tuple[int, Tree, list[int]]]:
    """Yield images after each event from ``begin`` on, and what was reported durable by then.

    Args:
        count: random ones after each event, beside the certain ones. Equal images come once.
    """
    platter, reported = Platter(root), []
    seen: set[tuple[bytes, int]] = set()
    for i, event in enumerate(events):
        platter.apply(event)
        if event.kind == "note":
            reported.append(event.note)
        if i < begin:
            continue
        for keep in [*CERTAIN, *range(platter.young), *[chance] * count]:
            tree = platter.image(keep)
            key = fingerprint(tree), len(reported)
            if key not in seen:
                seen.add(key)
                yield i, tree, list(reported)


def survey(log: Log, scenario: Scenario, scratch: Path, chance: random.Random, count: int,
           begin: int = 0) -> Iterator[str]:  # fmt: skip
    """Check all images of a log; yield what is wrong with those that break a promise."""
    for i, tree, reported in images(log.events, log.root, chance, count, begin):
        image = scratch / "image"
        write_image(tree, image)
        try:
            scenario.check(image, reported)
        except (AssertionError, asyncsave.AsyncSaveError) as broken:
            names = [f"{event.kind} {event.path.name}" for event in log.events[i - 3 : i + 1]]
            yield f"after {names}, {reported} reported: {type(broken).__name__}: {broken}"
        counts.add("images")
        shutil.rmtree(image)


def record(scenario: Scenario, directory: Path, steps: int, make: MakeDisk = CrashDisk) -> Log:
    root = directory / "disk"
    root.mkdir(parents=True)
    log = Log(root)
    scenario.record(log, steps, make(log))
    return log


@each_scenario
def test_power_cuts(tmp_path: Path, scenario: Scenario) -> None:
    log = record(scenario, tmp_path, 4)
    assert list(survey(log, scenario, tmp_path, random.Random(1), 6)) == []


@pytest.mark.slow
@each_scenario
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_power_cuts(tmp_path: Path, scenario: Scenario, seed: int) -> None:
    log = record(scenario, tmp_path, 6)
    assert list(survey(log, scenario, tmp_path, random.Random(seed), 30)) == []


def interrupted(
    scenario: Scenario, directory: Path, at: int, *, killed: bool, make: MakeDisk = CrashDisk
) -> tuple[Log, int] | None:
    """Record a run whose operation ``at`` fails, or that is killed there, and a run after it.

    Returns:
        The log, and the number of the event from which on it differs from an undisturbed one; None
        if there are not so many operations.
    """
    root = directory / "disk"
    root.mkdir(parents=True)
    log, faults = Log(root), Faults(at, errno.EIO, lasting=killed)
    with contextlib.suppress(asyncsave.AsyncSaveError):
        scenario.record(log, 3, CrashDisk(log, FaultDisk(faults)))
    if faults.hit is None:
        return None
    begin = len(log.events)
    scenario.record(log, 1, make(log))
    return log, begin if killed else 0


@each_scenario
def test_power_cuts_after_a_kill(tmp_path: Path, scenario: Scenario) -> None:
    """What the killed run had not synced is still not synced when the next one tidies up."""
    broken_logs = after_interruptions(scenario, tmp_path, killed=True, every=7, count=1)
    assert broken_logs == []


@pytest.mark.slow
@each_scenario
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "failed"])
def test_power_cuts_after_every_kill_and_every_fault(
    tmp_path: Path, scenario: Scenario, killed: bool
) -> None:
    assert after_interruptions(scenario, tmp_path, killed=killed, every=1, count=4) == []


def after_interruptions(
    scenario: Scenario, scratch: Path, *, killed: bool, every: int, count: int
) -> list[str]:
    broken: list[str] = []
    for at in itertools.count(0, every):
        recorded = interrupted(scenario, scratch / str(at), at, killed=killed)
        if recorded is None:
            return broken
        counts.add("kills" if killed else "faults")
        log, begin = recorded
        chance = random.Random(at)
        found = survey(log, scenario, scratch, chance, count, begin)
        broken += [f"interrupted at {at}: {each}" for each in found]
        shutil.rmtree(scratch / str(at))
    raise AssertionError


def test_a_directory_that_somebody_made_just_before(tmp_path: Path) -> None:
    def made_by_hand(log: Log) -> WrappedDisk:
        disk = CrashDisk(log)
        for path in (log.root / "runs", log.root / "runs" / "a"):
            disk.create_directory(path)
        log.add("sync_directory", log.root)
        return disk

    log = record(SCENARIOS["run"], tmp_path, 1, made_by_hand)
    assert list(survey(log, SCENARIOS["run"], tmp_path, random.Random(1), 1)) == []


READ = """
import sys, hashlib, asyncsave
for path in sys.argv[1:]:
    asyncsave.verify(path)
    state = asyncsave.load(path)
    print(state["step"], hashlib.sha256(state["w"].numpy().tobytes()).hexdigest())
"""


def test_a_fresh_process_reads_images(tmp_path: Path) -> None:
    """The last image after each of the saves, all of them in one new process."""
    log = record(SCENARIOS["run"], tmp_path, 3)
    last: dict[int, Tree] = {}
    for _, tree, reported in images(log.events, log.root, random.Random(5), 4):
        if reported:
            last[reported[-1]] = tree
    for step, tree in last.items():
        write_image(tree, tmp_path / str(step))
        counts.add("images")
    paths = [tmp_path / str(step) / "runs" / "a" for step in last]
    ended = children.run(READ, *paths)
    assert ended.returncode == 0, ended.stderr
    for step, line in zip(last, ended.stdout.splitlines(), strict=True):
        found, digest = line.split()
        assert int(found) in (step, step + 1)
        bytes_ = state_of(int(found))["w"].numpy().tobytes()
        assert digest == hashlib.sha256(bytes_).hexdigest()


# -- mutants ----------------------------------------------------------------------------------


class Forgetful(WrappedDisk):
    """Leaves out the syncs that ``forgets``, called with the path, says it should."""

    def __init__(self, forgets: Callable[[Path], bool], disk: WrappedDisk) -> None:
        super().__init__(disk)
        self.forgets = forgets

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        file = await super().create(path, executor)
        return Unsynced(file) if self.forgets(path) else file

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        super().write_file(path, data, sync=sync and not self.forgets(path))

    def sync_directory(self, path: Path) -> None:
        if not self.forgets(path):
            super().sync_directory(path)


class Unsynced(WrappedFile):
    async def sync(self) -> None:
        pass


class EarlyRename(WrappedDisk):
    """Writes manifests only once their directory has its name, and the name is synced."""

    def __init__(self, disk: WrappedDisk) -> None:
        super().__init__(disk)
        self.held: dict[Path, list[tuple[str, bytes]]] = {}

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        self.held.setdefault(path.parent, []).append((path.name, data))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.make_up(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        done = super().exchange(one, other)
        if done:
            self.make_up(one, other)
        return done

    def make_up(self, draft: Path, target: Path) -> None:
        """Write what the checkpoint at ``target`` lacks, if it was a draft a moment ago."""
        if draft not in self.held:
            return
        super().sync_directory(target.parent)
        for name, data in self.held.pop(draft):
            super().write_file(target / name, data, sync=True)
        super().sync_directory(target)


class GreedyPruning(WrappedDisk):
    """Makes room for a checkpoint when it is about to be committed."""

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        if path.name == CHECKPOINT_FILE:
            run = Place(path.parent.parent, self.inner)
            prune(run, list_steps(run)[: -(KEEP - 1)])
        super().write_file(path, data, sync=sync)


class HastyPruning(WrappedDisk):
    """Leaves out the sync between the hiding of a checkpoint and its removal."""

    hides = False

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.hides = target.name.startswith(".")

    def sync_directory(self, path: Path) -> None:
        if not self.hides:
            super().sync_directory(path)
        self.hides = False


class HastyExchange(WrappedDisk):
    """Removes what was replaced as soon as it is."""

    def exchange(self, one: Path, other: Path) -> bool:
        done = super().exchange(one, other)
        if done:
            super().remove_tree(one)
        return done


def notices(scenario: Scenario, directory: Path, make: MakeDisk) -> bool:
    """Whether the harness finds a broken promise."""
    log = record(scenario, directory, 4, make)
    return next(survey(log, scenario, directory, random.Random(1), 6), None) is not None


FORGOTTEN: dict[str, Callable[[Path], bool]] = {
    "the data": lambda path: path.suffix == ".data",
    "rank manifest": lambda path: path.name == rank_file(0),
    "checkpoint.json": lambda path: path.name == CHECKPOINT_FILE,
    "the directory": lambda path: path.name.startswith("."),
    "the parent": lambda path: path.name in ("a", "runs"),
    "the parent's parent": lambda path: path.name == "disk",
}


@each_scenario
@pytest.mark.parametrize("forgets", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_forgotten_sync_is_noticed(
    tmp_path: Path, scenario: Scenario, forgets: Callable[[Path], bool]
) -> None:
    assert notices(scenario, tmp_path, lambda log: Forgetful(forgets, CrashDisk(log)))


@each_scenario
def test_a_rename_before_the_manifests_is_noticed(tmp_path: Path, scenario: Scenario) -> None:
    assert notices(scenario, tmp_path, lambda log: EarlyRename(CrashDisk(log)))


def test_pruning_before_the_commit_is_noticed(tmp_path: Path) -> None:
    assert notices(SCENARIOS["run"], tmp_path, lambda log: GreedyPruning(CrashDisk(log)))


def test_pruning_without_a_sync_is_noticed(tmp_path: Path) -> None:
    assert notices(SCENARIOS["run"], tmp_path, lambda log: HastyPruning(CrashDisk(log)))


def test_removing_what_was_replaced_before_the_sync_is_noticed(tmp_path: Path) -> None:
    assert notices(SCENARIOS["overwrite"], tmp_path, lambda log: HastyExchange(CrashDisk(log)))


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "mutant"])
def test_sweeping_without_a_sync_is_noticed(tmp_path: Path, sound: bool) -> None:
    """Killed between the swap and its sync: what was replaced may be the one on the device."""
    scenario, faults = SCENARIOS["overwrite"], Faults()
    record(scenario, tmp_path / "whole", 2, lambda log: CrashDisk(log, FaultDisk(faults)))
    swap = [each.kind for each in faults.operations].index("exchange")

    def make(log: Log) -> WrappedDisk:
        def forgets(path: Path) -> bool:  # all but those of commits
            return path.name == "runs" and log.events[-1].kind not in ("exchange", "rename")

        disk = CrashDisk(log)
        return disk if sound else Forgetful(forgets, disk)

    recorded = interrupted(scenario, tmp_path / "cut", swap + 1, killed=True, make=make)
    assert recorded is not None
    log, begin = recorded
    found = list(survey(log, scenario, tmp_path, random.Random(1), 1, begin))
    assert (found == []) == sound
