"""Sidecars: files that are saved beside a state, in the same commit."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from ..errors import ConfigError
from ..format.files import is_sidecar_name

Files = Mapping[str, Union[bytes, str, "os.PathLike[str]"]]
"""What ``files=`` takes: names, and bytes or the path of a file."""

MOST_BYTES = 256 << 20
"""Of all sidecars of a checkpoint: they are read whole, when the save is called."""

MOST_FILES = 1000

_TRIES = 3


def read_sidecars(files: Files | None) -> dict[str, bytes]:
    """Return the bytes of sidecar files as they are now, by name.

    Raises:
        ConfigError: a name cannot be one, a file cannot be read, or they are too long.
    """
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise ConfigError(
            f"files={files!r:.80} must be a dict, as in {{'config.json': b'…'}} or "
            "{'config.json': 'path/of/config.json'}"
        )
    if len(files) > MOST_FILES:
        raise ConfigError(f"files: there are {len(files)}, and no more than {MOST_FILES} may be")
    read: dict[str, bytes] = {}
    seen: set[str] = set()
    room = MOST_BYTES
    for name, source in files.items():
        if not is_sidecar_name(name):
            raise ConfigError(
                f"files: {name!r:.80} cannot be the name of a file in a checkpoint: take a plain "
                "name, without a folder, that does not begin with a dot and is none of asyncsave's"
            )
        if name.casefold() in seen:
            raise ConfigError(f"files: {name!r} is there twice, as some systems see names")
        seen.add(name.casefold())
        read[name] = _read(name, source, room)
        room -= len(read[name])
        if room < 0:
            raise _too_long(name)
    return read


def _too_long(name: str) -> ConfigError:
    return ConfigError(
        f"files: they are longer than {MOST_BYTES >> 20} MiB with {name!r}; what is so large "
        "belongs into the state, as an array, or beside the checkpoint"
    )


def _read(name: str, source: Any, room: int) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    hint = "; a str is the path of a file: for text pass text.encode()" * isinstance(source, str)
    try:
        # links are followed: it is the program's own path, and caches are made of links
        path = Path(os.fspath(source)).expanduser()
        for _ in range(_TRIES):
            data = _read_once(path, room)
            if data is not None:
                return data
    except TypeError as cause:
        raise ConfigError(
            f"files: {name!r} is a {type(source).__name__}, and must be bytes or a path"
        ) from cause
    except (OSError, ValueError, RuntimeError, MemoryError) as cause:
        raise ConfigError(f"files: {name!r} cannot be read: {cause}{hint}") from cause
    raise ConfigError(f"files: {name!r} is changed while it is read; save it when it is done")


def _read_once(path: Path, room: int) -> bytes | None:
    """Return a file's bytes, one more than there is room for at most; None if it was changed."""
    # a pipe would wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("it is no regular file")
        pieces = []
        while room >= 0 and (piece := os.read(descriptor, min(room + 1, before.st_size + 4096))):
            pieces.append(piece)
            room -= len(piece)
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    # (of /proc, no file has a length)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
