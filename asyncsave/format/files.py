"""Files: what those of a checkpoint are called, and the limits of what is in them."""

from __future__ import annotations

import re

FORMAT = 1
CHECKPOINT_FILE = "checkpoint.json"
FRAME_ALIGNMENT = 4096

MAX_CHECKPOINT_BYTES = 16 << 20
MAX_RANK_BYTES = 512 << 20
MAX_CHUNK_BYTES = 1 << 30
MAX_BYTES = 1 << 62
"""Of a data file, and of a tensor's elements."""

MAX_DIMS = 64

MAX_FILES = 1 << 16
"""Of data files of a rank."""


_LINKED = re.compile(r"rank-[0-9]{5}\.linked-([0-9]{1,5})\.data")
_OURS = re.compile(r"checkpoint\.json|rank-.*|step-.*|set-aside-.*", re.IGNORECASE)


def is_sidecar_name(name: object) -> bool:
    """Whether a file beside a state may have this name: a plain one, and none of ours."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode("utf-8", "replace")) <= 200
        and not name.startswith(".")
        and name == name.strip()
        and not set(name) & set('/\\:*?"<>|')
        and not _OURS.fullmatch(name)
    )


def rank_file(rank: int) -> str:
    """Return the name of a rank's manifest."""
    return f"rank-{rank:05d}.json"


def data_file(rank: int, number: int = 0) -> str:
    """Return the name of one of a rank's own data files."""
    return f"rank-{rank:05d}.{number}.data" if number else f"rank-{rank:05d}.data"


def linked_file(rank: int, number: int) -> str:
    """Return the name of a data file that a rank shares with an earlier checkpoint."""
    return f"rank-{rank:05d}.linked-{number}.data"


def linked_number(rank: int, name: str) -> int | None:
    """Return the number in such a name; None: it is none."""
    found = _LINKED.fullmatch(name)
    number = -1 if found is None else int(found[1])
    return number if 0 <= number < MAX_FILES and linked_file(rank, number) == name else None
