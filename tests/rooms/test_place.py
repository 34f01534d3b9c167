"""Place: what a disk refuses is said once, in asyncsave's words, and loses nothing of the cause."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncsave.errors import (
    BusyError,
    ConfigError,
    DiskFullError,
    IntegrityError,
    LoadError,
    WriteError,
)
from asyncsave.storage.local import LOCAL
from asyncsave.storage.place import Place, place_of
from tests.doubles.disks import WrappedDisk
from tests.doubles.fault_disk import FaultDisk, Faults


def refusing(tmp_path: Path, number: int) -> Place:
    return FaultDisk(Faults(0, number, lasting=True)).at(tmp_path / "a")


def create(place: Place) -> None:
    with ThreadPoolExecutor(1) as threads:
        asyncio.run(place.create(threads))


CHANGES: dict[str, Callable[[Place], object]] = {
    "make_directories": Place.make_directories,
    "create_directory": Place.create_directory,
    "create": create,
    "write_file": lambda place: place.write_file(b"x", sync=True),
    "sync": Place.sync,
    "rename": lambda place: (place.parent / "b").rename(place),
    "exchange": lambda place: (place.parent / "b").exchange(place),
    "remove": Place.remove,
    "lock": Place.lock,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, WriteError), (errno.ENOSPC, DiskFullError)]
)
def test_a_refused_change_is_a_write_error(
    tmp_path: Path, change: str, number: int, kind: type[WriteError]
) -> None:
    with pytest.raises(WriteError) as caught:
        CHANGES[change](refusing(tmp_path, number))
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert caught.value.path == tmp_path / "a"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("look", [Place.names, Place.is_directory])
def test_a_refused_look_is_a_load_error(tmp_path: Path, look: Callable[[Place], object]) -> None:
    with pytest.raises(LoadError, match="cannot be read") as caught:
        look(refusing(tmp_path, errno.EIO))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, IntegrityError), (errno.ELOOP, IntegrityError), (errno.EMFILE, LoadError)],
)
def test_what_is_no_damage_is_not_called_so(
    tmp_path: Path, number: int, kind: type[LoadError]
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(LoadError) as opening:
        refusing(tmp_path, number).open()
    assert type(opening.value) is kind
    faults = Faults(1, number)
    file = FaultDisk(faults).at(tmp_path / "a").open()
    with pytest.raises(LoadError) as reading:
        file.read_into(0, memoryview(bytearray(3)))
    file.close()
    assert type(reading.value) is kind


def test_what_is_not_there(tmp_path: Path) -> None:
    place = Place(tmp_path / "a")
    assert (place.exists(), place.is_directory(), place.names()) == (False, False, [])
    with pytest.raises(IntegrityError, match="a is missing"):
        place.open()
    (tmp_path / "a").write_bytes(b"")
    assert (place.exists(), place.is_directory(), place.names()) == (True, False, [])


def test_a_directory_that_is_held_is_busy(tmp_path: Path) -> None:
    lock = Place(tmp_path).lock()
    assert lock is not None
    with pytest.raises(BusyError, match="in use"):
        Place(tmp_path).lock()
    lock.release()


def test_directories_are_made_through_links_and_not_over_files(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Place(tmp_path / "link" / "b" / "c").make_directories()
    assert (tmp_path / "real" / "b" / "c").is_dir()
    Place(tmp_path / "link" / "b" / "c").make_directories()
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/b"):
        with pytest.raises(WriteError, match="not a directory"):
            Place(tmp_path / name).make_directories()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_directory_that_somebody_else_makes_meanwhile_is_fine(tmp_path: Path) -> None:
    class Racing(WrappedDisk):
        def create_directory(self, path: Path) -> None:
            os.mkdir(path)
            super().create_directory(path)

    Racing().at(tmp_path / "a" / "b").make_directories()
    assert (tmp_path / "a" / "b").is_dir()


def test_a_place_is_a_path(tmp_path: Path) -> None:
    place = Place(tmp_path / "a", FaultDisk(Faults()))
    assert os.fspath(place) == str(place) == str(tmp_path / "a")
    assert place_of(place) is place
    assert place_of(tmp_path / "a") == place, "where it is makes it the same"
    assert place_of(str(tmp_path / "a")).disk is LOCAL
    assert place.parent / "a" == place
    assert (place / "b").disk is place.disk
    assert place_of("~/x").path == Path.home() / "x"
    for wrong in ("s3://bucket/a", Path("s3://bucket/a"), "", "a\0b", 7, b"a"):
        with pytest.raises(ConfigError):
            place_of(wrong)  # type: ignore[arg-type]
