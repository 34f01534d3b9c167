"""Listing: which checkpoints there are, and are they sound? ``verify`` and ``checkpoints``."""

from __future__ import annotations

import contextlib
import datetime
import time
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckpointNotFoundError, FormatError, IntegrityError, LoadError
from ..format.files import CHECKPOINT_FILE, data_file
from ..report import CheckpointInfo, VerifyReport
from ..storage.place import PathLike, Place, place_of
from .checkpoint import Checkpoint
from .files import read_record
from .history import Entry, History
from .newest import find


def verify(path: PathLike) -> VerifyReport:
    """Read and decode every byte of a checkpoint, or of all those in a run directory.

    Raises:
        IntegrityError, FormatError: the first damage found in each damaged checkpoint; if several
            are damaged, the error is the newest one's and the others are in its notes. So is how
            many are sound, and which one `restore` would take.
        CheckpointNotFoundError: there is no checkpoint.
    """
    began = time.perf_counter()
    place = place_of(path)
    history = find(place)
    chunks = raw_bytes = stored_bytes = 0
    damage: dict[Path, LoadError] = {}
    harmless: set[Path] = set()
    for each in history.entries:
        try:
            if each.error is not None:  # a disk that reads it at the second attempt is not sound
                raise each.error
            with Checkpoint.open(each.place) as checkpoint:
                checkpoint.check()
                harmless.add(each.path)  # whatever is found from here on
                checkpoint.check_files()
                checkpoint.check_gaps()
                chunks += checkpoint.chunk_count
                raw_bytes += checkpoint.raw_bytes
                stored_bytes += checkpoint.stored_bytes
        except LoadError as error:
            damage[each.path] = error
    newest = _newest(history, damage, harmless)
    if damage:
        raise _told(place, history, damage, newest)
    assert newest is not None
    paths = tuple(each.path for each in reversed(history.entries))
    seconds = time.perf_counter() - began
    return VerifyReport(paths, newest, chunks, raw_bytes, stored_bytes, seconds)


def _newest(history: History, damage: dict[Path, LoadError], harmless: set[Path]) -> Path | None:
    """Return what `restore` would take, by the rule of reading/newest.py.

    Args:
        harmless: those whose values are all sound, though there may be damage between them.
    """
    for each in history.line:
        if each.path in harmless:
            return each.path
        error = damage[each.path]
        if type(error) not in (IntegrityError, FormatError, CheckpointNotFoundError):
            return None
    return None


def _told(
    place: Place, history: History, damage: dict[Path, LoadError], newest: Path | None
) -> LoadError:
    """Return the newest damaged one's error, with all else in its notes."""
    (first, error), *others = damage.items()
    for path, older in others:
        error.add_note(f"also damaged: {path}: {older}")
    if first != place.path:
        count = len(history.entries)
        takes = f"restore() would take {newest}" if newest else "restore() would take none of them"
        error.add_note(f"{count - len(damage)} of {count} checkpoints are sound; {takes}")
    return error


def checkpoints(path: PathLike, *, verify: bool = False) -> list[CheckpointInfo]:
    """Return what is known of each checkpoint of a run, in the order they were committed.

    Args:
        path: a run directory; or a checkpoint, then the list has this one.
        verify: read every byte, to know whether it is sound. Without it, only ``checkpoint.json``
            is read, and ``sound`` is None unless that is damaged.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        LoadError: the directory cannot be read.
    """
    place = place_of(path)
    history = find(place)
    if history.line[0].place == place:
        try:
            record = read_record(place)
            entry = Entry(-1 if record.step is None else record.step, place, record)
        except LoadError as error:
            entry = Entry(-1, place, error=error)
        history = History((entry,), (), 0)
    return list_checkpoints(history, verify=verify)


def list_checkpoints(history: History, *, verify: bool) -> list[CheckpointInfo]:
    """Do what `checkpoints` says, for a history."""
    infos = []
    for each in reversed(history.entries):
        error = each.error
        if verify and error is None:
            try:
                with Checkpoint.open(each.place) as checkpoint:
                    checkpoint.check()
                    checkpoint.check_files()
                    checkpoint.check_gaps()
            except LoadError as found:
                error = found
        infos.append(
            CheckpointInfo(
                step=None if each.step < 0 else each.step,
                path=each.path,
                time=_time(each),
                metrics={} if each.record is None else dict(each.record.metrics),
                metadata=None if each.record is None else _plain(each.record.metadata),
                files=() if each.record is None else tuple(f.file for f in each.record.files),
                stored_bytes=_stored_bytes(each),
                shared_bytes=_shared_bytes(each),
                newest=each is history.line[0],
                left=each in history.left,
                sound=False if error is not None else True if verify else None,
                error="" if error is None else str(error),
            )
        )
    return infos


def _time(entry: Entry) -> datetime.datetime | None:
    with contextlib.suppress(ValueError):
        if entry.record is not None:
            return datetime.datetime.fromisoformat(entry.record.time)
    return None


def _plain(metadata: Any) -> Any:
    return msgspec.to_builtins(metadata)


def _stored_bytes(entry: Entry) -> int | None:
    """Return how long its own files are; None where that cannot be told."""
    if entry.record is None:
        return None
    ranks = entry.record.ranks
    total = sum(each.length for each in (*ranks, *entry.record.files))
    names = [CHECKPOINT_FILE]
    names += [data_file(rank) for rank, each in enumerate(ranks) if each.own is None]
    try:
        for name in names:
            file = (entry.place / name).open()
            total += file.nbytes
            file.close()
    except LoadError:
        return None
    return total + sum(each.own or 0 for each in ranks)


def _shared_bytes(entry: Entry) -> int:
    return 0 if entry.record is None else sum(each.shared for each in entry.record.ranks)
