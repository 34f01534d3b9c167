"""Reading past the page cache gives the same bytes as reading through it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave.pages import pages
from asyncsave.storage.direct import LocalReadable

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


def test_who_refuses_direct_reads_is_read_otherwise(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LocalReadable(tmp_path / "file")
    monkeypatch.setattr(LocalReadable, "is_cached", lambda *_: False)
    preadv, refused = os.preadv, 0

    def refusing(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal refused
        if descriptor == file._direct:
            refused += 1
            raise OSError(errno.EINVAL, "no")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    memory = pages(LENGTH)
    assert file.read_into(0, memory.data) == LENGTH
    assert memory.tobytes() == data
    assert refused == (file._direct >= 0)
    file.close()


@pytest.mark.parametrize("compression", ["off", 1])
@pytest.mark.parametrize("available", [0, 12 << 20, 1 << 40])
def test_restore_with_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, compression: Any
) -> None:
    """What cannot be held is read twice, and the promise is kept with any of it."""
    from asyncsave.reading.checkpoint import Checkpoint

    monkeypatch.setattr("asyncsave.pipeline.budget.CHUNK_BYTES", 1 << 20)
    state = {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20)}
    asyncsave.save(state, tmp_path / "a", compression=compression).result()
    monkeypatch.setattr("asyncsave.restoring.apply.available_memory", lambda: available)
    monkeypatch.setattr(LocalReadable, "is_cached", lambda *_: False)
    reads, frame = 0, Checkpoint._frame

    def counting(self: Checkpoint, i: int, memory: Any) -> Any:
        nonlocal reads
        reads += 1
        return frame(self, i, memory)

    monkeypatch.setattr(Checkpoint, "_frame", counting)
    into = {name: torch.zeros(1 << 20) for name in state}
    asyncsave.restore(tmp_path / "a", into)
    assert all(torch.equal(into[name], state[name]) for name in state)
    chunks = asyncsave.verify(tmp_path / "a").chunks
    reads -= chunks
    assert chunks == 8
    assert reads == {0: 16, 12 << 20: 10, 1 << 40: 8}[available]

    with open(tmp_path / "a" / "rank-00000.data", "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    into = {name: torch.zeros(1 << 20) for name in state}
    with pytest.raises(asyncsave.IntegrityError, match="checksum"):
        asyncsave.restore(tmp_path / "a", into)
    assert not any(tensor.any() for tensor in into.values())


def test_memory_that_lacks_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run must not go on from an older checkpoint because memory was short for a moment."""
    with asyncsave.Checkpointer(tmp_path, compression="off") as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": torch.full((1 << 20,), float(step))}, block=True)

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("asyncsave.storage.direct.LocalReadable.read_into", refuse)
    monkeypatch.setattr(
        "asyncsave.reading.checkpoint._read_first",
        lambda _, path: (path / "checkpoint.json").read_bytes(),
    )
    monkeypatch.setattr(
        "asyncsave.reading.checkpoint._read_all",
        lambda _, path, *more, **options: path.read_bytes(),
    )
    with pytest.raises(asyncsave.LoadError, match="cannot be read now") as caught:
        asyncsave.load(tmp_path)
    assert not isinstance(caught.value, asyncsave.IntegrityError)
