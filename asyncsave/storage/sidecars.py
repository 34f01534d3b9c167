"""Sidecars: files that are saved beside a state, in the same commit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from ..errors import ConfigError, LoadError
from ..format.files import is_sidecar_name
from .place import place_of

Files = Mapping[str, Union[bytes, str, "os.PathLike[str]"]]
"""What ``files=`` takes: names, and bytes or the path of a file."""

MOST_BYTES = 256 << 20
"""Of all sidecars of a checkpoint: they are read whole, when the save is called."""


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
    read: dict[str, bytes] = {}
    for name, source in files.items():
        if not is_sidecar_name(name):
            raise ConfigError(
                f"files: {name!r:.80} cannot be the name of a file in a checkpoint: take a plain "
                "name, without a folder, that does not begin with a dot and is none of asyncsave's"
            )
        if name.casefold() in map(str.casefold, read):
            raise ConfigError(f"files: {name!r} is there twice, as some systems see names")
        read[name] = _read(name, source)
        if sum(map(len, read.values())) > MOST_BYTES:
            raise ConfigError(
                f"files: they are longer than {MOST_BYTES >> 20} MiB with {name!r}; what is so "
                "large belongs into the state, as an array, or beside the checkpoint"
            )
    return read


def _read(name: str, source: Any) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    hint = "; a str is the path of a file: for text pass text.encode()" * isinstance(source, str)
    try:
        # links are followed: it is the program's own path, and caches are made of links
        file = place_of(Path(os.fspath(source)).expanduser().resolve()).open()
    except TypeError as cause:
        raise ConfigError(
            f"files: {name!r} is a {type(source).__name__}, and must be bytes or a path"
        ) from cause
    except (LoadError, OSError, ValueError, RuntimeError) as cause:
        raise ConfigError(f"files: {name!r} cannot be read: {cause}{hint}") from cause
    try:
        if file.nbytes > MOST_BYTES:
            raise ConfigError(
                f"files: {name!r} is longer than {MOST_BYTES >> 20} MiB; what is so large belongs "
                "beside the checkpoint"
            )
        data = bytearray(file.nbytes)
        count = file.read_into(0, memoryview(data))
    except LoadError as cause:
        raise ConfigError(f"files: {name!r} cannot be read: {cause}") from cause
    finally:
        file.close()
    return bytes(data[:count])
