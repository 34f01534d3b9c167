"""Reading past the page cache gives the same bytes as reading through it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import asyncsave
from asyncsave.pages import pages
from asyncsave.storage.direct import LocalReadable
from asyncsave.storage.disk import ReadableFile
from tests.doubles.disks import AskingDisk, WrappedDisk
from tests.doubles.fault_disk import FaultDisk, Faults

LENGTH = (9 << 20) + 1234


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    data = np.random.default_rng(0).bytes(LENGTH)
    (tmp_path / "file").write_bytes(data)
    return data


def spans() -> list[tuple[int, int]]:
    whole = [(0, LENGTH), (4096, 300 << 10), (8 << 20, LENGTH - (8 << 20)), (8 << 20, 2 << 20)]
    return [*whole, (4096, (5 << 20) + 77), (5, 1 << 20), (0, 100), (LENGTH, 100), (1 << 30, 1)]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_way_gives_the_same_bytes(
    tmp_path: Path, data: bytes, cold: bool, aligned: bool
) -> None:
    file = LocalReadable(tmp_path / "file")
    for offset, nbytes in spans():
        if cold:
            drop(tmp_path / "file")
        memory = pages(nbytes + 64)[:nbytes] if aligned else pages(nbytes + 64)[64:]
        count = file.read_into(offset, memory.data)
        assert memory[:count].tobytes() == data[offset : offset + nbytes]
        assert count == max(0, min(nbytes, LENGTH - offset))
    file.close()


def test_a_cold_read_leaves_the_page_cache_alone(tmp_path: Path, data: bytes) -> None:
    file = LocalReadable(tmp_path / "file")
    drop(tmp_path / "file")
    if file.is_cached(0, LENGTH):
        pytest.skip("this filesystem keeps its files in memory, or does not tell")
    memory = pages(LENGTH)
    assert file.read_into(0, memory.data) == LENGTH
    assert not file.is_cached(0, 8 << 20)
    (tmp_path / "file").read_bytes()
    assert file.is_cached(0, LENGTH)
    file.close()


class Cold(LocalReadable):
    """A file that the page cache is said to know nothing of."""

    def is_cached(self, offset: int, nbytes: int) -> bool:
        return False


class ColdDisk(WrappedDisk):
    def open(self, path: Path) -> ReadableFile:
        return Cold(path)


def test_who_refuses_direct_reads_is_read_otherwise(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, refused = os.preadv, 0

    def refusing(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal refused
        if is_direct(descriptor):
            refused += 1
            raise OSError(errno.EINVAL, "no")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    file = Cold(tmp_path / "file")
    memory = pages(LENGTH)
    assert file.read_into(0, memory.data) == LENGTH
    assert memory.tobytes() == data
    file.close()
    try:
        os.close(os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        assert refused == 0, "this filesystem has no direct reads"
    else:
        assert refused == 1


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("compression", ["off", 1])
@pytest.mark.parametrize("available", [0, 6 << 20, 1 << 40])
def test_restore_with_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, compression: Any
) -> None:
    """What cannot be held is read twice, and the promise is kept with any of it."""
    # little memory to save with makes short chunks
    state = {"a": torch.randn(1 << 18), "b": torch.randn(1 << 18), "c": torch.randn(1 << 19)}
    limit = 700_000 if compression == "off" else 2 << 20
    report = asyncsave.save(
        state, tmp_path / "a", compression=compression, memory_limit=limit
    ).result()
    assert report.chunks == 64
    faults = Faults()
    place = FaultDisk(faults, ColdDisk()).at(tmp_path / "a")

    def reads() -> int:
        return sum(each.kind == "read" for each in faults.operations if is_data(each.path))

    memory = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    into = {name: torch.zeros_like(value) for name, value in state.items()}
    asyncsave.restore(place, into)
    assert all(torch.equal(into[name], state[name]) for name in state)
    # half of what is available is used to hold stored chunks, the first ones
    manifest = json.loads((tmp_path / "a" / "rank-00000.json").read_bytes())
    ends = itertools.accumulate(chunk["length"] for chunk in manifest["chunks"])
    held = sum(end <= available // 2 for end in ends)
    # as they are stored: compressed, more of them fit
    assert (
        held
        in {0: [0], 6 << 20: [48] if compression == "off" else range(49, 64), 1 << 40: [64]}[
            available
        ]
    )
    assert reads() == 64 + 64 - held

    with open(tmp_path / "a" / "rank-00000.data", "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    into = {name: torch.zeros_like(value) for name, value in state.items()}
    with pytest.raises(asyncsave.IntegrityError, match="checksum"):
        asyncsave.restore(place, into)
    assert not any(tensor.any() for tensor in into.values())


def is_data(path: Path) -> bool:
    return path.suffix == ".data"


def test_memory_that_lacks_is_no_damage(tmp_path: Path) -> None:
    """A run must not go on from an older checkpoint because memory was short for a moment."""
    with asyncsave.Checkpointer(tmp_path, compression="off") as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": torch.full((1 << 20,), float(step))}, block=True)

    def refuse(what: str, path: Path) -> None:
        if what == "read_into" and is_data(path):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with pytest.raises(asyncsave.LoadError, match="cannot be read now") as caught:
        asyncsave.load(AskingDisk(refuse).at(tmp_path))
    assert not isinstance(caught.value, asyncsave.IntegrityError)
