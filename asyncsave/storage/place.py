"""Place: where a checkpoint or a run is, as people write it. Pure: it looks at nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ConfigError

PathLike = str | os.PathLike[str]

# Also what pathlib makes of one: Path("s3://bucket/a") is "s3:/bucket/a". A drive's letter is none.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: PathLike) -> Path:
    """Return ``path`` with ``~`` expanded, and absolute.

    Raises:
        ConfigError: it is a URL, or no path at all.
    """
    try:
        text = os.fspath(path)
    except TypeError as cause:
        raise ConfigError(
            f"a path is wanted, a str or a pathlib.Path, not {path!r:.80}, "
            f"which is a {type(path).__name__}"
        ) from cause
    if not isinstance(text, str) or "\0" in text or not text:
        raise ConfigError(f"{text!r:.80} cannot be a path: give a str, or a pathlib.Path")
    scheme = _SCHEME.match(text)
    if scheme:
        raise ConfigError(
            f"{text!r:.200} is a URL, and nothing here handles {scheme[1]}://. Save to a local "
            "directory, or to where that storage is mounted"
        )
    try:
        return Path(os.path.abspath(Path(text).expanduser()))
    except RuntimeError as cause:
        raise ConfigError(f"{text!r:.200}: there is no such home directory") from cause
