"""CrashDisk: remembers what is done to the disk, and what a power cut would leave of it.

`Log` takes down every change that asyncsave makes. `Platter` plays a log again and knows, at any
point, what is on the device for certain: bytes that were synced with their file, names that were
synced with their directory. Whatever is younger may be there or not, in any order that keeps each
name's own history: `Platter.image` picks one such outcome, `write_image` makes a directory of it.
"""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from asyncsave.storage.disk import Disk, WritableFile
from asyncsave.storage.local import LOCAL
from tests.doubles.disks import WrappedDisk, WrappedFile

PAGE, SECTOR = 4096, 512


@dataclass(frozen=True, slots=True)
class Event:
    """One change to the disk, or a note of the test. ``other`` is the new name of a rename."""

    kind: str
    path: Path
    other: Path | None = None
    data: bytes = b""
    note: Any = None


class Log:
    """All changes below ``root``, in their order. Any thread may add."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self._lock = threading.Lock()

    def add(self, kind: str, path: Path, other: Path | None = None, data: bytes = b"") -> None:
        with self._lock:
            self.events.append(Event(kind, path, other, data))

    def note(self, what: Any) -> None:
        """Note what the test knows from here on."""
        with self._lock:
            self.events.append(Event("note", self.root, note=what))


class CrashDisk(WrappedDisk):
    """Logs every change to the disk behind it. Its steps are as small as the system's.

    What is behind it may fail, and half-way: what it has done is logged all the same.
    """

    def __init__(self, log: Log, disk: Disk = LOCAL) -> None:
        super().__init__(disk)
        self.log = log

    def create_directory(self, path: Path) -> None:
        super().create_directory(path)
        self.log.add("mkdir", path)

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        file = await super().create(path, executor)
        self.log.add("create", path)
        return _LoggedFile(file, path, self.log)

    def write_file(self, path: Path, data: bytes, *, sync: bool) -> None:
        super().write_file(path, data, sync=sync)
        self.log.add("create", path)
        self.log.add("write", path, data=data)
        if sync:
            self.log.add("sync", path)

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self.log.add("remove", path)

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        super().link(source, target, sync=sync)
        self.log.add("link", source, target)
        if sync:
            self.log.add("sync", target)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.log.add("sync_directory", path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.add("rename", source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        if not super().exchange(one, other):
            return False
        self.log.add("exchange", one, other)
        return True

    def remove_tree(self, path: Path) -> None:
        there = [*sorted(path.rglob("*"), reverse=True), *([path] if path.exists() else [])]
        try:
            super().remove_tree(path)
        finally:
            for each in there:
                if not each.exists():
                    self.log.add("remove", each)


class _LoggedFile(WrappedFile):
    def __init__(self, file: WritableFile, path: Path, log: Log) -> None:
        super().__init__(file)
        self._path, self._log = path, log

    async def write(self, view: memoryview) -> int:
        count = await super().write(view)
        self._log.add("write", self._path, data=bytes(view[:count]))
        return count

    async def sync(self) -> None:
        await super().sync()
        self._log.add("sync", self._path)


@dataclass(eq=False, slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: int = 0  # files are only appended to: what was synced is a beginning


@dataclass(eq=False, slots=True)
class _Directory:
    entries: dict[str, _Node] = field(default_factory=dict)
    durable: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Directory
_Change = list[tuple[_Directory, str, _Node | None]]
Tree = dict[str, Any]
Keep = Literal["nothing", "everything", "names", "data"]


class Platter:
    """The disk below ``log.root`` after some of the log's events. The root itself is durable."""

    def __init__(self, root: Path) -> None:
        self._root_path = root
        self._root = _Directory()
        self._pending: list[_Change] = []

    def apply(self, event: Event) -> None:
        """Let one event happen."""
        if event.kind == "note" or not event.path.is_relative_to(self._root_path):
            return
        if event.kind == "sync_directory":
            self._sync_directory(self._find(event.path))
            return
        parent, name = self._find(event.path.parent), event.path.name
        if event.kind in ("write", "sync"):
            file = parent.entries[name]
            assert isinstance(file, _File)
            file.data += event.data
            if event.kind == "sync":
                file.synced = len(file.data)
            return
        if event.kind in ("mkdir", "create"):
            self._change([(parent, name, _Directory() if event.kind == "mkdir" else _File())])
        elif event.kind == "remove":
            self._change([(parent, name, None)])
        elif event.kind == "link":
            assert event.other is not None
            self._change([(self._find(event.other.parent), event.other.name, parent.entries[name])])
        else:
            assert event.kind in ("rename", "exchange")
            assert event.other is not None
            to, new = self._find(event.other.parent), event.other.name
            back = to.entries[new] if event.kind == "exchange" else None
            self._change([(parent, name, back), (to, new, parent.entries[name])])

    @property
    def young(self) -> int:
        """How many changes of names may be lost."""
        return len(self._pending)

    def image(self, keep: Keep | int | random.Random) -> Tree:
        """Return what a power cut now would leave: names with bytes, or with trees.

        Args:
            keep: of what was not synced, nothing, everything, all names but no bytes, all bytes but
                no names; everything but the change of names of this number, and those that need
                it; or a source of chance.
        """
        names: dict[_Directory, dict[str, _Node]] = {}
        for change in self._survivors(keep):
            for directory, name, node in change:
                entries = names.setdefault(directory, dict(directory.durable))
                entries.pop(name, None)
                if node is not None:
                    entries[name] = node

        def tree(directory: _Directory) -> Tree:
            entries = names.get(directory, directory.durable)
            return {
                name: tree(node) if isinstance(node, _Directory) else _content(node, keep)
                for name, node in sorted(entries.items())
            }

        return tree(self._root)

    def _find(self, path: Path) -> _Directory:
        node: _Node = self._root
        for name in path.relative_to(self._root_path).parts:
            assert isinstance(node, _Directory)
            node = node.entries[name]
        assert isinstance(node, _Directory)
        return node

    def _change(self, change: _Change) -> None:
        for directory, name, node in change:
            directory.entries.pop(name, None)
            if node is not None:
                directory.entries[name] = node
        self._pending.append(change)

    def _sync_directory(self, directory: _Directory) -> None:
        waiting = []
        for change in self._pending:
            if all(each is not directory for each, _, _ in change):
                waiting.append(change)
                continue
            for each, name, node in change:
                each.durable.pop(name, None)
                if node is not None:
                    each.durable[name] = node
        self._pending = waiting

    def _survivors(self, keep: Keep | int | random.Random) -> list[_Change]:
        if isinstance(keep, str):
            return self._pending if keep in ("everything", "names") else []
        if isinstance(keep, random.Random):
            if keep.random() < 0.3:
                return self._pending[: keep.randint(0, self.young)]
            share = keep.choice([0.2, 0.5, 0.8])
            gone = {i for i in range(self.young) if keep.random() > share}
        else:
            gone = {keep}
        lost: set[tuple[_Directory, str]] = set()
        survivors = []
        for i, change in enumerate(self._pending):
            touched = {(directory, name) for directory, name, _ in change}
            # a name's later change is not there without its earlier ones
            if touched & lost or i in gone:
                lost |= touched
            else:
                survivors.append(change)
        return survivors


def _content(file: _File, keep: Keep | int | random.Random) -> bytes:
    """Return a file's bytes after a power cut: the synced ones, and of the others what survived."""
    if not isinstance(keep, random.Random):
        lost = keep in ("nothing", "names")
        return bytes(file.data[: file.synced] if lost else file.data)
    young = len(file.data) - file.synced
    if not young or (chosen := keep.random()) < 0.2:
        return bytes(file.data[: file.synced])
    if chosen < 0.4:
        return bytes(file.data)
    length = file.synced + keep.choice([young, keep.randint(0, young)])
    content = file.data[:length]
    for page in range(file.synced // PAGE, -(-length // PAGE)):
        start, stop = max(page * PAGE, file.synced), min((page + 1) * PAGE, length)
        chosen = keep.random()
        if chosen < 0.5:  # kept
            continue
        if chosen < 0.75:  # torn: some of its sectors are there
            start = min(stop, start + SECTOR * keep.randrange(PAGE // SECTOR))
        content[start:stop] = bytes(stop - start)
    return bytes(content)


def write_image(tree: Tree, path: Path) -> None:
    """Make a directory of an image."""
    path.mkdir()
    for name, node in tree.items():
        if isinstance(node, bytes):
            (path / name).write_bytes(node)
        else:
            write_image(node, path / name)


def fingerprint(tree: Tree) -> bytes:
    """Return what tells images apart."""
    seen = hashlib.blake2b()

    def add(node: Tree | bytes, name: str) -> None:
        seen.update(f"{name!r} {len(node)} {type(node).__name__} ".encode())
        if isinstance(node, bytes):
            seen.update(node)
        else:
            for inner in node:
                add(node[inner], inner)

    add(tree, "")
    return seen.digest()
