"""Files beside a state: in the same commit, under a checksum, both or neither."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave.storage import sidecars
from asyncsave.storage.place import Place
from tests.doubles.fault_disk import FaultDisk, Faults

STATE = {"x": torch.arange(5.0)}


def test_bytes_and_paths(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    link = tmp_path / "link"  # caches are made of links
    link.symlink_to(config)
    files = {
        "config.json": config,
        "tokenizer model.bin": bytes(range(256)) * 5000,
        "empty": bytearray(),
        "as text": str(link),
        "größe.txt": memoryview(b"g"),
    }
    handle = asyncsave.save(STATE, tmp_path / "a", files=files)
    config.write_text("changed, after the call")
    report = handle.result()
    found = {each.name: each.read_bytes() for each in (tmp_path / "a").iterdir()}
    assert found["config.json"] == found["as text"] == b"{}"
    assert found["tokenizer model.bin"] == files["tokenizer model.bin"]
    assert found["empty"] == b""
    assert report.stored_bytes == sum(map(len, found.values()))
    (info,) = asyncsave.checkpoints(tmp_path / "a", verify=True)
    assert info.sound
    assert info.files == tuple(files)
    assert info.stored_bytes == report.stored_bytes
    assert asyncsave.verify(tmp_path / "a").stored_bytes == report.stored_bytes
    assert torch.equal(asyncsave.load(tmp_path / "a")["x"], STATE["x"])


def test_of_every_kind_of_save(tmp_path: Path) -> None:
    with asyncsave.Saver() as saver:
        saver.save(STATE, tmp_path / "s", files={"a": b"1"}).result()
    with asyncsave.Checkpointer(tmp_path / "run", every_steps=2) as ckpt:
        assert ckpt.step(1, STATE, files={"a": b"none is due"}) is None
        ckpt.step(2, STATE, files={"a": b"2"})
        ckpt.save(3, STATE, files={"a": b"3"}, block=True)
        ckpt.save(4, STATE, block=True)
        assert [info.files for info in ckpt.checkpoints()] == [("a",), ("a",), ()]
    assert (tmp_path / "s" / "a").read_bytes() == b"1"
    assert (tmp_path / "run" / "step-000000002" / "a").read_bytes() == b"2"
    assert (tmp_path / "run" / "step-000000003" / "a").read_bytes() == b"3"


NAMES = (
    "",
    ".hidden",
    "a/b",
    "../a",
    "a\\b",
    "checkpoint.json",
    "Checkpoint.JSON",
    "rank-00000.data",
    "rank-x",
    "step-000000001",
    "a\nb",
    " a",
    "a ",
    "x" * 201,
    "é" * 101,
    "a:b",
    "\ud800",
    5,
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_one(tmp_path: Path, name: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match=r"files: .* plain"):
        asyncsave.save(STATE, tmp_path / "a", files={name: b"x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a": "no/such/file"}, "cannot be read.*for text pass"),
        ({"a": Path("no/such/file")}, "cannot be read"),
        ({"a": '{"text": "in place of a path"}'}, "for text pass text.encode"),
        ({"a": "/"}, "cannot be read"),
        ({"a": "\0"}, "cannot be read"),
        ({"a": 5}, "must be bytes or a path"),
        ({"a": b"", "A": b""}, "there twice"),
        ([("a", b"")], "must be a dict"),
    ],
)
def test_what_cannot_be_saved_beside(tmp_path: Path, files: Any, says: str) -> None:
    with pytest.raises(asyncsave.ConfigError, match=says):
        asyncsave.save(STATE, tmp_path / "a", files=files)
    with asyncsave.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(asyncsave.ConfigError, match=says):
            ckpt.save(1, STATE, files=files)
        assert ckpt.steps() == []


def test_what_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecars, "MOST_BYTES", 1 << 20)  # 256 MiB take long to write
    (tmp_path / "long").write_bytes(bytes((1 << 20) + 1))
    for files in ({"a": tmp_path / "long"}, {"a": bytes(1 << 19), "b": bytes((1 << 19) + 1)}):
        with pytest.raises(asyncsave.ConfigError, match="longer than 1 MiB"):
            asyncsave.save(STATE, tmp_path / "a", files=files)


def test_files_without_a_length(tmp_path: Path) -> None:
    asyncsave.save(STATE, tmp_path / "a", files={"version": "/proc/version"}).result()
    assert (tmp_path / "a" / "version").read_bytes() == Path("/proc/version").read_bytes() != b""


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path / "loop", tmp_path):
        with pytest.raises(asyncsave.ConfigError, match="cannot be read"):
            asyncsave.save(STATE, tmp_path / "a", files={"x": path})


def test_a_file_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1")
    real, reads = os.fstat, []

    def fstat(descriptor: int) -> Any:
        reads.append(descriptor)
        with path.open("ab") as file:
            file.write(b"x" * len(reads))
        return real(descriptor)

    monkeypatch.setattr(sidecars.os, "fstat", fstat)
    with pytest.raises(asyncsave.ConfigError, match="is changed while it is read"):
        asyncsave.save(STATE, tmp_path / "a", files={"log": path})


def test_the_bytes_are_let_go_of(tmp_path: Path) -> None:
    data = b"x" * 5_000_000
    with asyncsave.Saver() as saver:
        report = saver.save(STATE, tmp_path / "a", files={"x": data}).result()
        assert report.peak_memory_bytes >= 5_000_000
        before = sys.getrefcount(data)
        saver.save(STATE, tmp_path / "b", files={"x": data}).result()
        saver.wait()
        assert sys.getrefcount(data) == before


@pytest.mark.parametrize("damage", ["gone", "longer", "shorter", "a bit", "a link"])
def test_a_damaged_file_is_found_and_the_state_still_loads(tmp_path: Path, damage: str) -> None:
    with asyncsave.Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE, files={"config.json": b"{...}" * 500_000}, block=True)
    path = tmp_path / "run" / "step-000000002" / "config.json"
    data = path.read_bytes()
    path.unlink()
    if damage == "longer":
        path.write_bytes(data + b"x")
    elif damage == "shorter":
        path.write_bytes(data[:-1])
    elif damage == "a bit":
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif damage == "a link":
        (tmp_path / "other").write_bytes(data)
        path.symlink_to(tmp_path / "other")
    with pytest.raises(asyncsave.IntegrityError, match=r"config\.json") as caught:
        asyncsave.verify(tmp_path / "run")
    assert any(
        "restore() would take" in note and "000002" in note for note in caught.value.__notes__
    )
    with pytest.raises(asyncsave.IntegrityError):
        asyncsave.verify(path.parent)
    infos = asyncsave.checkpoints(tmp_path / "run", verify=True)
    assert [info.sound for info in infos] == [True, False]
    assert torch.equal(asyncsave.load(tmp_path / "run")["x"], STATE["x"])


def test_both_or_neither(tmp_path: Path) -> None:
    """A disk that refuses the i-th operation, for every i."""
    for i in range(1000):
        faults = Faults(i, errno.EIO)
        disk = FaultDisk(faults)
        place = Place(tmp_path / str(i) / "a", disk)
        place.path.parent.mkdir()
        try:
            with asyncsave.Saver() as saver:
                saver.save(STATE, place, files={"one": b"1", "two": b"2" * 9000}).result()
        except asyncsave.AsyncSaveError:
            if not place.path.exists():
                assert [each for each in place.path.parent.iterdir() if each.name[0] != "."] == []
                continue
        asyncsave.verify(place.path)
        assert (place.path / "two").read_bytes() == b"2" * 9000
        if faults.hit is None:
            break
    assert 12 < i < 1000


def test_a_name_from_outside_is_not_believed(tmp_path: Path) -> None:
    from tests.sweeps.attacks.forge import sign_text

    asyncsave.save(STATE, tmp_path / "a", files={"config.json": b"{}"}).result()
    record = json.loads((tmp_path / "a" / "checkpoint.json").read_text())
    del record["xxh3_128"]
    sound = record["files"][0]
    for files in (
        [sound | {"file": "../../../../etc/passwd"}],
        [sound | {"file": "rank-00000.data"}],
        [sound, sound | {"file": "CONFIG.json"}],
        [sound | {"length": -1}],
        [sound | {"length": 2**63}],
        [sound | {"xxh3_128": "0"}],
        [5],
    ):
        sign_text(tmp_path / "a", json.dumps(record | {"files": files}))
        with pytest.raises(asyncsave.FormatError):
            asyncsave.load(tmp_path / "a")
    sign_text(tmp_path / "a", json.dumps(record | {"files": [sound]}))
    asyncsave.verify(tmp_path / "a")
