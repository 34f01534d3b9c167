"""Files: the two that say what a checkpoint has, read whole."""

from __future__ import annotations

import xxhash

from ..errors import CheckpointNotFoundError, FormatError, IntegrityError, LoadError
from ..format.checked import decode_checkpoint
from ..format.files import CHECKPOINT_FILE, MAX_CHECKPOINT_BYTES
from ..format.records import CheckpointRecord, EntryRecord
from ..storage.files import File
from ..storage.place import Place

_READ_BYTES = 1 << 20


def read_record(place: Place) -> CheckpointRecord:
    """Return the ``checkpoint.json`` of the checkpoint at ``place``, validated.

    Raises:
        CheckpointNotFoundError, FormatError, UnsupportedVersionError, IntegrityError.
    """
    return decode_checkpoint(read_first(place), place.path / CHECKPOINT_FILE)


def read_first(place: Place) -> bytes | bytearray:
    """Return the bytes of the ``checkpoint.json`` of the checkpoint at ``place``.

    Raises:
        CheckpointNotFoundError: there is none.
        LoadError: whether there is one cannot be told; or see `read_whole`.
    """
    file = place / CHECKPOINT_FILE
    if not file.exists():
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {place}: it has no {CHECKPOINT_FILE}"
        )
    return read_whole(file, MAX_CHECKPOINT_BYTES)


def read_whole(place: Place, limit: int, exactly: int | None = None) -> bytes | bytearray:
    """Return all bytes of a file.

    Args:
        limit: the longest that it may be, in bytes.
        exactly: its length, if that is known.

    Raises:
        IntegrityError: it is missing, cannot be read, or is not as long.
        FormatError: it is too long.
        LoadError: it cannot be read now, which says nothing of it; or there is no memory.
    """
    file = place.open()
    try:
        if exactly is not None:
            check_length(file, exactly)
        if file.nbytes > limit:
            raise FormatError(f"{place} is {file.nbytes} bytes long; at most {limit} are allowed")
        buffer = bytearray(file.nbytes)
        count = file.read_into(0, memoryview(buffer))
    except MemoryError as cause:
        raise LoadError(f"there is no memory for the {file.nbytes} bytes of {place}") from cause
    finally:
        file.close()
    del buffer[count:]
    return buffer


def check_length(file: File, nbytes: int) -> None:
    """Raise IntegrityError if an open file is not ``nbytes`` long."""
    if file.nbytes != nbytes:
        raise IntegrityError(
            f"{file.path} is {file.nbytes} bytes long, not {nbytes}",
            path=file.path,
            offset=min(file.nbytes, nbytes),
        )


def check_entry(place: Place, entry: EntryRecord) -> None:
    """Read a file, and compare it with what ``checkpoint.json`` says of it.

    Raises:
        IntegrityError: it is missing, cannot be read, or is another.
        LoadError: it cannot be read now.
    """
    file = place.open()
    try:
        check_length(file, entry.length)
        found, done = xxhash.xxh3_128(), 0
        buffer = bytearray(min(_READ_BYTES, entry.length))
        while done < entry.length:
            piece = memoryview(buffer)[: entry.length - done]
            count = file.read_into(done, piece)
            if not count:
                break
            found.update(piece[:count])
            done += count
    finally:
        file.close()
    if found.hexdigest() != entry.xxh3_128:
        raise IntegrityError(
            f"{place} is damaged: it is not the file that {CHECKPOINT_FILE} describes",
            path=place.path,
            offset=0,
        )
