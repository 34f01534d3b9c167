"""Place: the seam. What a disk refuses is said once in our words, and nothing is asked twice."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncsave
from asyncsave import AsyncSaveError
from asyncsave.pages import pages
from asyncsave.storage.disk import Disk, ReadableFile, WritableFile
from asyncsave.storage.files import NewFile
from asyncsave.storage.local import LOCAL
from asyncsave.storage.place import Place, place_of
from tests.doubles.disks import WrappedDisk, WrappedFile
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import at_once

# -- errors ---------------------------------------------------------------------------------------


class RefusingDisk(FaultDisk):
    """`exists` fails as well, which a local disk's cannot."""

    def exists(self, path: Path) -> bool:
        self.faults.meet("exists", path)
        return super().exists(path)


def failing(number: int, at: int = 0) -> tuple[Faults, Disk]:
    faults = Faults(at, number, lasting=True)
    return faults, RefusingDisk(faults)


def make_file(place: Place) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            file = await place.create(pool)
            await file.close()

    asyncio.run(main())


CHANGES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    # what is done at "a" in a directory, which name is blamed, and what is said
    "create_directory": (Place.create_directory, "a", "create"),
    "create": (make_file, "a", "create"),
    "write_file": (lambda place: place.write_file(b"x", sync=True), "a", "write"),
    "sync_directory": (Place.sync, "a", "sync"),
    "rename": (lambda place: place.rename(place.parent / "b"), "b", "rename to"),
    "exchange": (lambda place: place.exchange(place.parent / "b"), "b", "replace"),
    "remove_tree": (Place.remove, "a", "remove"),
    "lock": (Place.lock, "a", "lock"),
}
LOOKS: dict[str, Callable[[Place], object]] = {
    "exists": Place.exists,
    "is_directory": Place.is_directory,
    "list_directory": Place.names,
    "open": Place.open,
}
NUMBERS = [
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR),
    *(errno.EMFILE, errno.EEXIST, errno.ESTALE, errno.ETIMEDOUT, errno.EPERM, errno.ENOENT),
]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", CHANGES)
def test_what_cannot_be_changed_is_a_write_error(tmp_path: Path, kind: str, number: int) -> None:
    faults, disk = failing(number)
    change, blamed, doing = CHANGES[kind]
    with pytest.raises(asyncsave.WriteError) as caught:
        change(Place(tmp_path / "a", disk))
    assert [each.kind for each in faults.operations] == [kind], "it is asked once"
    error = caught.value
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert type(error) is (asyncsave.DiskFullError if full else asyncsave.WriteError)
    assert (error.path, error.errno) == (tmp_path / blamed, number)
    assert f"cannot {doing} {tmp_path / blamed}: {os.strerror(number)}" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == number


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", LOOKS)
def test_what_cannot_be_looked_at_is_a_load_error(tmp_path: Path, kind: str, number: int) -> None:
    faults, disk = failing(number)
    place = Place(tmp_path / "a", disk)
    if kind == "list_directory" and number in (errno.ENOENT, errno.ENOTDIR):
        assert place.names() == []
        return
    with pytest.raises(asyncsave.LoadError) as caught:
        LOOKS[kind](place)
    assert [each.kind for each in faults.operations] == [kind]
    error = caught.value
    assert str(tmp_path / "a") in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == number
    if kind == "open" and number == errno.ENOENT:
        assert "is missing" in str(error)
    else:
        assert os.strerror(number) in str(error)


NOT_DAMAGE = [
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
]
DAMAGE = [errno.EIO, errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODATA]


@pytest.mark.parametrize("at", ["open", "read"])
@pytest.mark.parametrize("number", [*NOT_DAMAGE, *DAMAGE], ids=errno.errorcode.get)
def test_only_what_says_something_of_the_bytes_is_damage(
    tmp_path: Path, number: int, at: str
) -> None:
    """Damage is passed over for an older checkpoint; all else would lose work that way."""
    (tmp_path / "a").write_bytes(bytes(10_000))
    _, disk = failing(number, at=at == "read")

    def use() -> None:
        file = Place(tmp_path / "a", disk).open()
        assert (file.path, file.nbytes) == (tmp_path / "a", 10_000)
        try:
            file.read_into(4096, memoryview(bytearray(100)))
        finally:
            file.close()

    with pytest.raises(asyncsave.LoadError) as caught:
        use()
    error = caught.value
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == number
    if number in NOT_DAMAGE:
        assert type(error) is asyncsave.LoadError
        assert f"cannot be {'opened' if at == 'open' else 'read'} now" in str(error)
    else:
        assert isinstance(error, asyncsave.IntegrityError)
        assert (error.path, error.offset) == (tmp_path / "a", 0 if at == "open" else 4096)


@pytest.mark.parametrize("kind", ["write", "sync", "close"])
def test_a_new_files_errors_are_write_errors(tmp_path: Path, kind: str) -> None:
    class Kind(Faults):
        def meet(self, kind_: str, path: Path, *rest: int) -> Any:
            self.at = len(self.operations) if kind_ == kind else -1
            return super().meet(kind_, path, *rest)

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            file = await FaultDisk(Kind(-1, errno.EIO)).at(tmp_path / "a").create(pool)
            try:
                await file.append(pages(4096).data)
                await file.sync()
            finally:
                await file.close()

    with pytest.raises(asyncsave.WriteError, match=f"cannot {kind} .*: Input/output") as caught:
        asyncio.run(main())
    assert (caught.value.path, caught.value.errno) == (tmp_path / "a", errno.EIO)


def test_an_error_without_a_number_says_its_text(tmp_path: Path) -> None:
    """Whoever writes a Disk may raise one."""

    class Odd(WrappedDisk):
        def list_directory(self, path: Path) -> list[str]:
            raise OSError("the bucket is gone")

        def open(self, path: Path) -> ReadableFile:
            raise OSError("the bucket is gone")

        def sync_directory(self, path: Path) -> None:
            raise OSError("the bucket is gone")

    for use, kind in (
        (Place.names, asyncsave.LoadError),
        (Place.open, asyncsave.IntegrityError),
        (Place.sync, asyncsave.WriteError),
    ):
        with pytest.raises(kind, match="the bucket is gone"):
            use(Odd().at(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_what_is_no_refusal_passes_as_it_is(tmp_path: Path, error: type[BaseException]) -> None:
    class Broken(WrappedDisk):
        def exists(self, path: Path) -> bool:
            raise error

        def sync_directory(self, path: Path) -> None:
            raise error

    for use in (Place.exists, Place.sync):
        with pytest.raises(error):
            use(Broken().at(tmp_path))


def test_a_lock_that_is_held_is_busy(tmp_path: Path) -> None:
    place = Place(tmp_path)
    lock = place.lock()
    if lock is None:
        pytest.skip("this filesystem has no locks")
    with pytest.raises(asyncsave.BusyError, match="is in use") as caught:
        place.lock()
    assert isinstance(caught.value.__cause__, BlockingIOError)
    lock.release()
    lock.release()  # once more is as good
    again = place.lock()
    assert again is not None
    again.release()


def test_no_error_of_the_system_comes_through(tmp_path: Path) -> None:
    """All there is to a Place, over a disk that refuses everything."""
    public = {name for name in dir(Place) if not name.startswith("_")}
    pure = {"path", "disk", "name", "parent"}
    uses: dict[str, Callable[[Place], object]] = {
        "make_directories": Place.make_directories,
        "write_file": lambda place: place.write_file(b"", sync=False),
        "rename": lambda place: place.rename(place.parent / "b"),
        "exchange": lambda place: place.exchange(place.parent / "b"),
        "create": make_file,
        "link": lambda place: place.link(place.parent / "b", sync=True),
        **{
            name: getattr(Place, name)
            for name in ("exists", "identity", "is_directory", "free_bytes", "names", "open")
        },
        **{
            name: getattr(Place, name)
            for name in ("create_directory", "sync", "remove", "remove_file", "lock")
        },
    }
    assert uses.keys() == public - pure, "a new method is looked at here, too"
    for use in uses.values():
        _, disk = failing(errno.EIO)
        with pytest.raises(AsyncSaveError):
            use(Place(tmp_path / "a", disk))


# -- files ----------------------------------------------------------------------------------------


def test_a_file_that_takes_little_at_once_is_written_whole(tmp_path: Path) -> None:
    class Sip(WrappedFile):
        async def write(self, view: memoryview) -> int:
            return await super().write(view[:4096])

    class SipDisk(WrappedDisk):
        async def create(self, path: Path, executor: Executor) -> WritableFile:
            return Sip(await super().create(path, executor))

    data = pages(5 * 4096)
    data[:] = torch.randint(0, 256, (data.size,), dtype=torch.uint8).numpy()

    async def main() -> NewFile:
        with ThreadPoolExecutor(1) as pool:
            file = await SipDisk().at(tmp_path / "a").create(pool)
            for nbytes in (3 * 4096, 2 * 4096):
                await file.append(data[file.nbytes : file.nbytes + nbytes].data)
            await file.sync()
            await file.close()
            return file

    file = asyncio.run(main())
    assert (file.path, file.nbytes) == (tmp_path / "a", data.size)
    assert (tmp_path / "a").read_bytes() == data.tobytes()


def test_what_is_made_must_be_new(tmp_path: Path) -> None:
    place = Place(tmp_path / "a")
    place.write_file(b"mine", sync=True)
    again: list[Callable[[Place], object]] = [lambda p: p.write_file(b"x", sync=False), make_file]
    for make in again:
        with pytest.raises(asyncsave.WriteError) as caught:
            make(place)
        assert caught.value.errno == errno.EEXIST
    with pytest.raises(asyncsave.WriteError):
        place.create_directory()
    assert (tmp_path / "a").read_bytes() == b"mine"


# -- looking --------------------------------------------------------------------------------------


def test_names_of_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    for name in ("b", "a", ".c"):
        (tmp_path / "full" / name).mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    place = Place(tmp_path)
    assert (place / "full").names() == (place / "link").names() == [".c", "a", "b"]
    for name in ("nothing", "file", "broken", "nothing/deeper", "file/deeper"):
        assert (place / name).names() == []


def test_what_a_link_is(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "directory")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    place = Place(tmp_path)
    found = {name: ((place / name).exists(), (place / name).is_directory()) for name in NAMES}
    assert found == {
        "directory": (True, True),
        "file": (True, False),
        "link": (True, False),
        "broken": (True, False),
        "nothing": (False, False),
    }
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    for name in ("to file", "broken", "directory"):
        with pytest.raises(asyncsave.IntegrityError):
            (place / name).open()


def test_what_cannot_be_looked_at_is_not_taken_for_missing(tmp_path: Path) -> None:
    """Who has no permission, as well; but no permission lacks root, who may run this."""
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "file").write_text("")
    for name in ("x" * 300, "round/deeper"):
        with pytest.raises(asyncsave.LoadError):
            (Place(tmp_path) / name).exists()
        with pytest.raises(asyncsave.LoadError) as caught:
            asyncsave.load(tmp_path / name)
        assert not isinstance(caught.value, asyncsave.CheckpointNotFoundError)
        with pytest.raises(asyncsave.WriteError):
            asyncsave.Checkpointer(tmp_path / name)
    assert not (Place(tmp_path) / "file" / "deeper").exists()


NAMES = ["directory", "file", "link", "broken", "nothing"]


# -- making directories ---------------------------------------------------------------------------


def changes(faults: Faults) -> list[tuple[str, Path]]:
    """Return what was changed, and in which order."""
    kinds = ("create_directory", "sync_directory")
    return [(each.kind, each.path) for each in faults.operations if each.kind in kinds]


def test_each_directory_is_durable_before_the_next_one(tmp_path: Path) -> None:
    faults = Faults()
    place = FaultDisk(faults).at(tmp_path / "a" / "b" / "c")
    place.make_directories()
    assert place.path.is_dir()
    assert changes(faults) == [
        ("sync_directory", tmp_path.parent),
        ("create_directory", tmp_path / "a"),
        ("sync_directory", tmp_path),
        ("create_directory", tmp_path / "a" / "b"),
        ("sync_directory", tmp_path / "a"),
        ("create_directory", tmp_path / "a" / "b" / "c"),
        ("sync_directory", tmp_path / "a" / "b"),
    ]
    faults.operations.clear()
    place.make_directories()
    assert changes(faults) == [("sync_directory", tmp_path / "a" / "b")], "it may be young"


def test_links_to_directories_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    Place(tmp_path / "link").make_directories()
    Place(tmp_path / "link" / "a" / "b").make_directories()
    assert (tmp_path / "real" / "a" / "b").is_dir()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("below", ["", "a", "a/b"])
@pytest.mark.parametrize("what", ["file", "broken", "loop"])
def test_what_is_in_the_way_is_said_and_stays(tmp_path: Path, what: str, below: str) -> None:
    top = tmp_path / "top"
    if what == "file":
        top.write_text("mine")
    else:
        top.symlink_to(tmp_path / "nothing" if what == "broken" else top)
    with pytest.raises(asyncsave.WriteError, match="a part of the path is a file") as caught:
        Place(top / below).make_directories()
    assert caught.value.path == top / below
    assert os.listdir(tmp_path) == ["top"]


class RacingDisk(WrappedDisk):
    """Calls ``first`` just before a directory of this name is made, as somebody else might do."""

    def __init__(self, name: str, first: Callable[[Path], object]) -> None:
        super().__init__()
        self.name, self.first = name, first
        self.synced: list[Path] = []

    def create_directory(self, path: Path) -> None:
        if path.name == self.name:
            self.first(path)
        super().create_directory(path)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.synced.append(path)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_somebody_else_makes_it_in_between(tmp_path: Path, name: str) -> None:
    disk = RacingDisk(name, Path.mkdir)
    place = disk.at(tmp_path / "a" / "b" / "c")
    place.make_directories()
    assert place.is_directory()
    # who made it may not have synced its name
    assert disk.synced == [tmp_path.parent, tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_somebody_else_makes_a_link_to_a_directory_in_between(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    disk = RacingDisk("a", lambda path: path.symlink_to(tmp_path / "real"))
    disk.at(tmp_path / "a" / "b").make_directories()
    assert (tmp_path / "real" / "b").is_dir()


@pytest.mark.parametrize(
    ("first", "number"),
    [(Path.touch, errno.EEXIST), (lambda path: path.parent.rmdir(), errno.ENOENT)],
    ids=["makes a file", "removes the parent"],
)
def test_somebody_else_is_in_the_way(
    tmp_path: Path, first: Callable[[Path], object], number: int
) -> None:
    with pytest.raises(asyncsave.WriteError) as caught:
        RacingDisk("b", first).at(tmp_path / "a" / "b").make_directories()
    assert caught.value.errno == number


def test_many_make_the_same_ones(tmp_path: Path) -> None:
    place = Place(tmp_path.joinpath(*"abcdefgh"))
    assert at_once(8, place.make_directories) == [None] * 8
    assert place.is_directory()


@pytest.mark.parametrize(
    ("number", "is_ours"),
    [
        *((each, False) for each in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)),
        *((errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.ESTALE, True)),
    ],
    ids=str,
)
def test_a_directory_that_was_there_may_be_somebody_elses(
    tmp_path: Path, number: int, is_ours: bool
) -> None:
    """Home directories lie in directories that only root may look into."""

    class Theirs(WrappedDisk):
        def sync_directory(self, path: Path) -> None:
            if path == tmp_path.parent:
                raise OSError(number, os.strerror(number))
            super().sync_directory(path)

    place = Theirs().at(tmp_path / "a")
    if is_ours:
        with pytest.raises(asyncsave.WriteError) as caught:
            place.make_directories()
        assert caught.value.errno == number
    else:
        place.make_directories()
        assert place.is_directory()


def test_a_directory_of_ours_must_be_synced(tmp_path: Path) -> None:
    faults = Faults(-1, errno.EACCES)
    place = FaultDisk(faults).at(tmp_path / "a")
    place.make_directories()
    faults.at = len(faults.operations) - 1  # the sync after it was made
    place.remove()
    faults.operations.clear()
    with pytest.raises(asyncsave.WriteError):
        place.make_directories()
    assert faults.hit is not None
    assert (faults.hit.kind, faults.hit.path) == ("sync_directory", tmp_path)


# -- what a place is ------------------------------------------------------------------------------


def test_a_place_is_a_path(tmp_path: Path) -> None:
    place = WrappedDisk().at(tmp_path)
    assert os.fspath(place) == str(place) == str(tmp_path)
    assert Path(place) == tmp_path
    assert (place / "a").path == tmp_path / "a"
    assert (place / "a").name == "a"
    assert (place / "a").parent == place
    assert (place / "a" / "b").disk is (place / "a").parent.disk is place.disk
    (tmp_path / "a").write_text("x")
    with open(place / "a") as file:
        assert file.read() == "x"


def test_places_are_the_same_where_their_paths_are(tmp_path: Path) -> None:
    here, there = Place(tmp_path), Place(tmp_path / "a")
    assert here == WrappedDisk().at(tmp_path)
    assert hash(here) == hash(WrappedDisk().at(tmp_path))
    assert here != there
    paths: list[object] = [tmp_path, str(tmp_path)]
    assert here not in paths
    assert {here, there, WrappedDisk().at(tmp_path)} == {here, there}
    assert "Disk" not in repr(here)
    with pytest.raises(FrozenInstanceError):
        here.path = tmp_path  # type: ignore[misc]


def test_place_of_is_absolute_and_knows_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, path in {
        "a/b": tmp_path / "a" / "b",
        "./a/../b/": tmp_path / "b",
        ".": tmp_path,
        "~/a": tmp_path / "home" / "a",
        "~": tmp_path / "home",
        "a~/b": tmp_path / "a~" / "b",
        "/": Path("/"),
        "c:/x": tmp_path / "c:" / "x",
    }.items():
        for each in (given, Path(given)):
            place = place_of(each)
            assert place == Place(path)
            assert place.disk is LOCAL
    assert list(tmp_path.iterdir()) == [], "it looks at nothing, and makes nothing"
    place = place_of("a")
    monkeypatch.chdir("/")
    assert place.path == tmp_path / "a", "wherever the program goes from there"


def test_place_of_leaves_a_place_as_it_is(tmp_path: Path) -> None:
    place = WrappedDisk().at(tmp_path / ".." / "a")
    assert place_of(place) is place


@pytest.mark.parametrize("path", [None, 7, b"bytes", "", "a\0b", object, ["a"]], ids=repr)
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match="path"):
        place_of(path)


@pytest.mark.parametrize(
    "path", ["s3://bucket/a", "gs://b", "hdfs:/x", Path("s3://bucket/a"), "file:///a"], ids=str
)
def test_a_url_is_no_path(path: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match="URL"):
        place_of(path)


def test_from_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(asyncsave.ConfigError, match="current directory, which is gone"):
        place_of("a")
    assert place_of("/a").path == Path("/a")


def test_a_home_that_nobody_has() -> None:
    with pytest.raises(asyncsave.ConfigError, match="no such home"):
        place_of("~nobody-of-this-name/a")
