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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave.reading.checkpoint import Checkpoint
from asyncsave.storage.filesystem import LocalFileSystem
from tests import counts
from tests.make_golden import CHECKPOINTS, GOLDEN
from tests.support import assert_same

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
        for chunk in json.loads(self.whole[FILES[1]])["chunks"]:
            self.frames.update(range(chunk["offset"], chunk["offset"] + chunk["length"]))

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


class Inline:
    """An executor without threads, which take most of the time that a small checkpoint takes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, job: Callable[..., None], *arguments: Any) -> Future[None]:
        done: Future[None] = Future()
        try:
            job(*arguments)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncsave.reading.checkpoint.ThreadPoolExecutor", Inline)


@pytest.mark.usefixtures("inline")
def test_every_byte_flipped(patient: Patient) -> None:
    pick = random.Random(0)

    def masks(name: str, offset: int) -> list[int]:
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
def test_every_operation_that_fails(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The disk reports an error at the first, second, … open or read: each time one of ours."""
    left = [0]
    name = "open" if operation == "open" else "preadv"
    real = getattr(os, name)

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, name, failing)
    for use in (asyncsave.load, asyncsave.verify):
        failures = 0
        for at in itertools.count(1):
            left[0] = at
            try:
                use(patient.path)
            except asyncsave.LoadError as error:
                failures += str(os.strerror(errno.EIO)) in str(error)
            if left[0] > 0:  # there were not so many
                assert failures == at - 1
                break
        assert failures >= 3


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "l"):
        if path.name == "l":
            path.symlink_to(path)
        for use in (asyncsave.load, asyncsave.verify, lambda path: asyncsave.restore(path, {})):
            with pytest.raises(asyncsave.LoadError):
                use(path)


@pytest.mark.parametrize(("chunk_bytes", "threads"), [(16 << 20, 8), (64 << 20, 2), (1 << 30, 1)])
def test_long_chunks_are_read_by_fewer_threads(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    asked = []

    class Counting(Inline):
        def __init__(self, count: int, **_: Any) -> None:
            asked.append(count)

    monkeypatch.setattr("asyncsave.reading.checkpoint.reader_threads", lambda: 8)
    monkeypatch.setattr("asyncsave.reading.checkpoint.ThreadPoolExecutor", Counting)
    with Checkpoint.open(LocalFileSystem(), patient.path) as checkpoint:
        checkpoint._longest = chunk_bytes
        checkpoint._each(range(100), lambda *_: None)
    assert asked == [threads]


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


@pytest.mark.parametrize("compression", ["off", 1])
def test_damage_between_the_check_and_the_reading_is_noticed(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, compression: asyncsave.Compression
) -> None:
    """Chunks that were not held are read and checked once more; the state is partly filled then."""
    state = {"w": torch.randn(100_000), "v": torch.randn(100_000)}
    path = patient.path.parent / "b"
    asyncsave.save(state, path, compression=compression).result()
    real = Checkpoint.check

    def check_and_harm(self: Checkpoint, *arguments: Any, **options: Any) -> Any:
        held = real(self, *arguments, **{**options, "hold_bytes": 0})
        with open(path / FILES[2], "r+b") as file:
            byte = file.read(1)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), 0)
        return held

    monkeypatch.setattr(Checkpoint, "check", check_and_harm)
    with pytest.raises(asyncsave.IntegrityError, match="checksum") as raised:
        asyncsave.restore(path, {"w": torch.zeros(100_000), "v": torch.zeros(100_000)})
    assert any("sound a moment ago" in note for note in raised.value.__notes__)


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
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("bit", range(8))
def test_every_bit_flipped(patient: Patient, bit: int) -> None:
    for name, offset, mask in patient.flips(lambda *_: [1 << bit]):
        assert patient.verify_raises(), (name, offset, mask)
        harmless = name == FILES[2] and offset not in patient.frames
        assert patient.restore_raises() != harmless


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_every_byte_of_a_golden_checkpoint_flipped(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "a")
    patient = Patient(tmp_path / "a", asyncsave.load(tmp_path / "a"))
    pick = random.Random(name)
    for file, offset, mask in patient.flips(lambda *_: [1 << pick.randrange(8)]):
        harmless = file == FILES[2] and offset not in patient.frames
        assert patient.load_raises() != harmless, (file, offset, mask)
