"""Damage: whatever happens to the bytes of a checkpoint, it is an error or it changes nothing.

Each test keeps a checkpoint's three files in memory, harms them on disk, and asks for one of two
outcomes: an error of the `LoadError` tree, with the live state as it was; or every bit that was
saved.
"""

from __future__ import annotations

import copy
import errno
import itertools
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import asyncsave
from asyncsave.storage.disk import ReadableFile
from asyncsave.storage.place import Place
from tests import counts
from tests.doubles.disks import WrappedDisk, WrappedReadable
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.make_golden import CHECKPOINTS, GOLDEN
from tests.support import assert_same
from tests.sweeps.attacks.forge import chunk, forge, padded, tensor

FILES = ("checkpoint.json", "rank-00000.json", "rank-00000.data")
DAMAGE = (
    asyncsave.IntegrityError,
    asyncsave.FormatError,  # and UnsupportedVersionError
    asyncsave.CheckpointNotFoundError,
)


def small(seed: int = 0) -> dict[str, Any]:
    """Return a state of few bytes, in which every family of codings has something to do."""
    torch.manual_seed(seed)
    return {
        "exp32": torch.randn(60) * 0.01,
        "exp16": (torch.randn(120) * 0.01).bfloat16(),
        "bytes8": torch.arange(40, dtype=torch.int64) + seed,
        "zstd": (torch.arange(120) % 7 + seed).to(torch.uint8),
        "raw": torch.randint(0, 256, (40,)).to(torch.float16),
        "array": np.arange(5.0) + seed,
        "plain": [1, -0.0, "text", None, (1 + seed, b"bytes"), 2**70],
    }


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """Return a live state to restore into, with other values in it."""
    return {
        key: value * 0 + 3 if isinstance(value, (torch.Tensor, np.ndarray)) else [0] * 6
        for key, value in state.items()
    }


class Patient:
    """A checkpoint that is harmed and healed again.

    Attributes:
        path: where it is.
        state: what was saved.
        whole: its files, as they were written.
    """

    def __init__(self, path: Path, state: Any) -> None:
        self.path = path
        self.state = state
        self.whole = {name: (path / name).read_bytes() for name in FILES}
        self._into = blank(state) if isinstance(state, dict) and "plain" in state else None
        self._before = copy.deepcopy(self._into)
        self.frames: set[int] = set()
        for each in json.loads(self.whole[FILES[1]])["chunks"]:
            self.frames.update(range(each["offset"], each["offset"] + each["length"]))

    def heal(self) -> None:
        for name, data in self.whole.items():
            (self.path / name).unlink(missing_ok=True)
            (self.path / name).write_bytes(data)

    def load_raises(self) -> bool:
        """Load it; return whether that raised. Anything but damage and equality fails the test."""
        try:
            loaded = asyncsave.load(self.path)
        except DAMAGE as error:
            return self._named_by(error)
        assert_same(loaded, self.state)
        return False

    def restore_raises(self) -> bool:
        """Restore it into a live state, which must be as it was if that raises."""
        assert self._into is not None
        try:
            asyncsave.restore(self.path, self._into)
        except DAMAGE as error:
            assert_same(self._into, self._before)
            return self._named_by(error)
        assert_same(self._into, self.state)
        self._into = copy.deepcopy(self._before)
        return False

    def verify_raises(self) -> bool:
        try:
            asyncsave.verify(self.path)
        except DAMAGE:
            return True
        return False

    def _named_by(self, error: Exception) -> bool:
        return str(self.path) in str(error)

    def flips(self, masks: Callable[[str, int], list[int]]) -> Iterator[tuple[str, int, int]]:
        """Flip bits of every byte of every file in turn, in place; yield while they are flipped."""
        for name in FILES:
            with open(self.path / name, "r+b", buffering=0) as file:
                for offset, byte in enumerate(self.whole[name]):
                    for mask in masks(name, offset):
                        os.pwrite(file.fileno(), bytes([byte ^ mask]), offset)
                        counts.add("flips")
                        yield name, offset, mask
                    os.pwrite(file.fileno(), bytes([byte]), offset)


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return patient_at(tmp_path / "patient")


def patient_at(path: Path, seed: int = 0) -> Patient:
    asyncsave.save(small(seed), path, compression=1).result()
    return Patient(path, small(seed))


def test_the_patient_has_every_family_of_codings(patient: Patient) -> None:
    chunks = json.loads(patient.whole[FILES[1]])["chunks"]
    families = {chunk["coding"].partition(".")[0] for chunk in chunks}
    assert families >= {"raw", "zstd", "bytes8", "exp16", "exp32"}
    assert not patient.load_raises()
    assert not patient.restore_raises()
    assert not patient.verify_raises()


@pytest.mark.parametrize("part", range(4))  # of all 16 bytes in a row, each fourth
def test_every_byte_flipped(patient: Patient, part: int) -> None:
    pick = random.Random(part)

    def masks(name: str, offset: int) -> list[int]:
        if offset // 16 % 4 != part:
            return []
        padding = name == FILES[2] and offset not in patient.frames
        return [1 << pick.randrange(8)] if padding else [1, 0x20, 0xFF]

    for name, offset, mask in patient.flips(masks):
        raises = patient.restore_raises() if mask == 0x20 else patient.load_raises()
        assert raises == (name != FILES[2] or offset in patient.frames), (name, offset, mask)
        if not raises and offset % 16 == 0:
            assert patient.verify_raises(), offset
    assert not patient.verify_raises()


def test_every_length(patient: Patient) -> None:
    for name in FILES:
        data = patient.whole[name]
        with open(patient.path / name, "r+b", buffering=0) as file:
            for length in reversed(range(len(data))):
                os.ftruncate(file.fileno(), length)
                assert patient.load_raises(), (name, length)
            os.pwrite(file.fileno(), data, 0)
            for more in (1, 4095, 4096, 1 << 20):
                os.ftruncate(file.fileno(), len(data) + more)
                assert patient.load_raises(), (name, more)
            os.ftruncate(file.fileno(), len(data))
        assert not patient.load_raises()


@pytest.mark.parametrize("which", ["load_raises", "restore_raises", "verify_raises"])
def test_files_missing_swapped_and_doubled(patient: Patient, which: str) -> None:
    raises = getattr(patient, which)
    for count in (1, 2, 3):
        for names in itertools.combinations(FILES, count):
            for name in names:
                (patient.path / name).unlink()
            assert raises(), f"without {names}"
            patient.heal()
    for one, other in itertools.permutations(FILES, 2):
        shutil.copy(patient.path / one, patient.path / other)
        assert raises(), f"{one} in place of {other}"
        patient.heal()
        (patient.path / one).rename(patient.path / "between")
        (patient.path / other).rename(patient.path / one)
        (patient.path / "between").rename(patient.path / other)
        assert raises(), f"{one} and {other} swapped"
        patient.heal()
    assert not raises()


@pytest.mark.parametrize("seed", [0, 1])
def test_files_of_another_checkpoint(tmp_path: Path, seed: int) -> None:
    """Seed 0: one that holds the same, so that some of its files may well stand in."""
    patient, other = patient_at(tmp_path / "a"), patient_at(tmp_path / "b", seed)
    raised = 0
    for count in (1, 2):
        for names in itertools.combinations(FILES, count):
            for name in names:
                shutil.copy(other.path / name, patient.path / name)
            for raises in (patient.load_raises, patient.restore_raises):
                raised += raises()
            patient.heal()
    assert raised == 12 if seed else raised <= 6


@pytest.mark.parametrize("seed", range(4))
def test_larger_damage(patient: Patient, seed: int) -> None:
    """Torn pages, zeroed sectors, garbage, bytes lost or repeated, several files at once."""
    pick = random.Random(seed)

    def harm(data: bytes) -> bytes:
        start = pick.randrange(len(data))
        length = pick.choice([1, 2, 16, 512, 4096])
        return pick.choice(
            [
                lambda: data[:start] + bytes(length) + data[start + length :],
                lambda: data[:start] + b"\xff" * length + data[start + length :],
                lambda: data[:start] + pick.randbytes(length) + data[start + length :],
                lambda: data[:start] + data[start + length :],
                lambda: data[:start] + data[start : start + length] + data[start:],
                lambda: data[start:] + data[:start],
                lambda: data[::-1],
            ]
        )()

    for _ in range(150):
        for name in pick.sample(FILES, pick.choice([1, 1, 1, 2, 3])):
            (patient.path / name).write_bytes(harm(patient.whole[name]))
        pick.choice([patient.load_raises, patient.restore_raises])()
        patient.heal()
    assert not patient.restore_raises()


@pytest.mark.parametrize("operation", ["open", "read"])
def test_every_operation_that_fails(patient: Patient, operation: str) -> None:
    """The disk reports an error at the first, second, … open or read: each time one of ours."""
    uses: list[Callable[[Place], object]] = [asyncsave.load, asyncsave.verify]
    for use in uses:
        failures = 0
        for at in itertools.count():
            faults = Faults(at, errno.EIO, kinds={operation})
            try:
                use(FaultDisk(faults).at(patient.path))
            except asyncsave.LoadError as error:
                failures += str(os.strerror(errno.EIO)) in str(error)
            if faults.hit is None:  # there were not so many
                assert failures == at
                break
            counts.add("faults")
        assert failures >= 3


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "l"):
        if path.name == "l":
            path.symlink_to(path)
        for use in (asyncsave.load, asyncsave.verify, lambda path: asyncsave.restore(path, {})):
            with pytest.raises(asyncsave.LoadError):
                use(path)


class Crowd(WrappedDisk):
    """Nobody reads data until ``enough`` do so at once.

    Attributes:
        most: how many there were.
    """

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough, self.inside, self.most = enough, 0, 0
        self.changed = threading.Condition()

    def open(self, path: Path) -> ReadableFile:
        file = super().open(path)
        return CrowdedFile(file, self) if path.suffix == ".data" else file


class CrowdedFile(WrappedReadable):
    def __init__(self, file: ReadableFile, crowd: Crowd) -> None:
        super().__init__(file)
        self.crowd = crowd

    def read_into(self, offset: int, view: memoryview) -> int:
        crowd = self.crowd
        with crowd.changed:
            crowd.inside += 1
            crowd.most = max(crowd.most, crowd.inside)
            crowd.changed.notify_all()
            crowd.changed.wait_for(lambda: crowd.most >= crowd.enough, 20)
        time.sleep(0.05)  # for one more, who must not come
        with crowd.changed:
            crowd.inside -= 1
        return super().read_into(offset, view)


@pytest.mark.parametrize(("chunk_bytes", "threads"), [(16 << 20, 8), (64 << 20, 2), (1 << 30, 1)])
def test_long_chunks_are_read_by_fewer_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    """Each has room for a frame, its planes and the chunk; eight are the most on many cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    frames = [b"no frame of zstd, %d" % i for i in range(20)]
    records = [
        chunk(frame, offset=4096 * i, coding="zstd", raw_length=chunk_bytes)
        for i, frame in enumerate(frames)
    ]
    whole = tensor([len(frames) * chunk_bytes])
    forge(tmp_path / "a", tensors=[whole], chunks=records, data=padded(*frames))
    crowd = Crowd(threads)
    with pytest.raises(asyncsave.IntegrityError, match="cannot be decoded"):
        asyncsave.verify(crowd.at(tmp_path / "a"))
    assert crowd.most == threads


# -- a run ----------------------------------------------------------------------------------------


def test_a_run_says_what_it_passed_over_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with asyncsave.Checkpointer(tmp_path, durable=False, compression=1) as run:
        for step in range(1, 6):
            run.save(step, small(step))
        run.wait()
        path = {step: tmp_path / f"step-{step:09d}" for step in range(1, 6)}
        shutil.copy(path[1] / FILES[2], path[5] / FILES[2])
        shutil.copy(path[1] / FILES[1], path[4] / FILES[1])
        (path[3] / FILES[0]).unlink()
        into = blank(small())
        assert run.restore(into) == 2
        assert_same(into, small(2))
        assert [each for each, _ in run.stats.passed_over] == [path[5], path[4], path[3]]
        reasons = [why for _, why in run.stats.passed_over]
        assert "does not have the checksum" in reasons[0]
        assert FILES[2] in reasons[0]
        assert FILES[1] in reasons[1]
        assert "it has no checkpoint.json" in reasons[2]
        for step, reason in zip((5, 4, 3), reasons, strict=True):
            assert f"passed over {path[step]}: {reason}" in caplog.text
        assert f"used {path[2]} instead" in caplog.text


def test_a_step_under_another_name_is_not_that_step(tmp_path: Path) -> None:
    one, two = tmp_path / "step-000000001", tmp_path / "step-000000002"
    with asyncsave.Checkpointer(tmp_path, durable=False, compression=1) as run:
        for step in (1, 2):
            run.save(step, small(step))
        run.wait()
        two.rename(tmp_path / "between")
        one.rename(two)
        (tmp_path / "between").rename(one)
        for use in (
            lambda: run.restore(blank(small())),
            lambda: run.restore(blank(small()), step=2),
            lambda: run.load(step=2),
            lambda: asyncsave.load(two),
            lambda: asyncsave.verify(two),
            lambda: asyncsave.verify(tmp_path),
        ):
            with pytest.raises(asyncsave.IntegrityError, match=r"step 1 .* to step-000000001,"):
                use()
        one.rename(tmp_path / "model")  # names no step: as good as any
        assert_same(asyncsave.load(tmp_path / "model"), small(2))
        two.rename(one)
        into = blank(small())
        assert run.restore(into) == 1
        assert_same(into, small(1))


class DecayingDisk(WrappedDisk):
    """The first bytes of data files are sound when they are read first, and then no more."""

    def open(self, path: Path) -> ReadableFile:
        file = super().open(path)
        return DecayingFile(file) if path.suffix == ".data" else file


class DecayingFile(WrappedReadable):
    begun = False

    def read_into(self, offset: int, view: memoryview) -> int:
        count = super().read_into(offset, view)
        if offset == 0:
            view[0] ^= self.begun
            self.begun = True
        return count


@pytest.mark.parametrize("compression", ["off", 1])
def test_damage_between_the_check_and_the_reading_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: asyncsave.Compression
) -> None:
    """Chunks that were not held are read and checked once more; the state is partly filled then."""
    state = {"w": torch.randn(100_000), "v": torch.randn(100_000)}
    path = tmp_path / "b"
    asyncsave.save(state, path, compression=compression).result()
    # a machine without memory to hold any of it
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    into = {"w": torch.zeros(100_000), "v": torch.zeros(100_000)}
    with pytest.raises(asyncsave.IntegrityError, match="checksum") as raised:
        asyncsave.restore(DecayingDisk().at(path), into)
    assert any("sound a moment ago" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_while_the_state_is_filled_is_tried_again(
    tmp_path: Path, error: int
) -> None:
    state = {name: torch.randn(100_000) for name in ("v", "w")}
    asyncsave.save(state, tmp_path / "a", compression="off", memory_limit=400_000).result()
    (
        tmp_path / "a" / "rank-00000.data"
    ).read_bytes()  # in the page cache it is not kept, but read twice

    def restore(faults: Faults) -> dict[str, torch.Tensor]:
        into = {name: torch.zeros(100_000) for name in state}
        asyncsave.restore(FaultDisk(faults).at(tmp_path / "a"), into)
        return into

    all_of_them = Faults(kinds={"read"})
    assert_same(restore(all_of_them), state)
    count = len(all_of_them.operations)
    chunks = (count - 2) // 2  # behind the two JSON files
    assert chunks >= 6
    for at in range(2 + chunks, count):
        assert_same(restore(Faults(at, error, kinds={"read"})), state)
    with pytest.raises(asyncsave.LoadError, match=os.strerror(error)) as raised:
        restore(Faults(2 + chunks, error, kinds={"read"}, lasting=True))
    assert "the state is partly filled" in str(raised.value.__notes__)


def test_every_file_of_the_newest_flipped_somewhere(tmp_path: Path) -> None:
    """Wherever it is harmed, the one before is used; where only padding is, the newest is."""
    with asyncsave.Checkpointer(tmp_path, durable=False, compression=1) as run:
        for step in (1, 2):
            run.save(step, small(step))
        run.wait()
        newest = Patient(tmp_path / "step-000000002", small(2))
        pick = random.Random(0)
        for name, offset, _ in newest.flips(lambda *_: [1] if pick.random() < 0.01 else []):
            into = blank(small())
            padding = name == FILES[2] and offset not in newest.frames
            expected = 2 if padding else 1
            assert run.restore(into) == expected, (name, offset)
            assert_same(into, small(expected))
            assert bool(run.stats.passed_over) != padding
            run.stats.passed_over.clear()


# -- more of it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bit", range(8))
def test_every_bit_flipped(patient: Patient, bit: int) -> None:
    for name, offset, mask in patient.flips(lambda *_: [1 << bit]):
        assert patient.verify_raises(), (name, offset, mask)
        harmless = name == FILES[2] and offset not in patient.frames
        assert patient.restore_raises() != harmless


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_every_byte_of_a_golden_checkpoint_flipped(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "a")
    patient = Patient(tmp_path / "a", asyncsave.load(tmp_path / "a"))
    pick = random.Random(name)
    for file, offset, mask in patient.flips(lambda *_: [1 << pick.randrange(8)]):
        harmless = file == FILES[2] and offset not in patient.frames
        assert patient.load_raises() != harmless, (file, offset, mask)
