"""Available: how much memory this process can still take before the kernel refuses it, or kills.

The least of what the machine has, what each control group on the way from the process's own up to
the root leaves, and what the process's own limits (RLIMIT_AS, RLIMIT_DATA) leave. Control groups
are those of version 1, of version 2, or of both at once.

What is free in a group is its limit less what is used, where page cache that can be dropped at once
does not count as used: a container that has read or written much is full of it. Cache that has yet
to be written counts, and so does tmpfs, which cannot be dropped at all. Swap is not counted.
``memory.high`` is taken for a limit, since the kernel stops whoever is above it for seconds.

A file that is not there, not readable or not as expected says nothing: no limit, no use, no cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_NO_LIMIT_BYTES = 1 << 62
"""Version 1 has no word for it, and shows the largest number of whole pages."""


@dataclass(frozen=True, slots=True)
class _Names:
    """What a version of control groups calls its files, and the lines of ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]
    unwritten: tuple[str, ...]


_V1 = _Names(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cache=("total_inactive_file", "total_active_file"),  # total: with the groups below
    unwritten=("total_dirty", "total_writeback"),
)
_V2 = _Names(
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cache=("inactive_file", "active_file", "slab_reclaimable"),
    unwritten=("file_dirty", "file_writeback"),
)


def available_memory(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take.

    Args:
        proc: the process's directory in ``/proc``.
        root: what mount points are below.
    """
    free = [int(psutil.virtual_memory().available)]
    for directory, names in _groups(proc, root):
        limits = [_number(_text(directory / name)) for name in names.limits]
        known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT_BYTES]
        if known:
            free.append(min(known) - _used(directory, names))
    free.extend(_process_free(proc))
    return max(0, min(free))


def _used(directory: Path, names: _Names) -> int:
    used = _number(_text(directory / names.usage)) or 0
    lines = (line.split() for line in _text(directory / "memory.stat").splitlines())
    stat = {words[0]: _number(words[1]) or 0 for words in lines if len(words) == 2}
    cache = sum(stat.get(name, 0) for name in names.cache)
    unwritten = sum(stat.get(name, 0) for name in names.unwritten)
    return max(0, used - max(0, cache - unwritten))


def _groups(proc: Path, root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield the directories of the groups that the process is in, from its own upwards."""
    paths: dict[str, PurePosixPath] = {}
    for line in _text(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = PurePosixPath(name)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = PurePosixPath(name)
    mounts = list(_mounts(proc))
    for kind, path in paths.items():
        tops = [(point, mounted) for each, mounted, point in mounts if each == kind]
        # A container sees its own group mounted, and may see the path that the host calls it by.
        reached = [(point, mounted) for point, mounted in tops if path.is_relative_to(mounted)]
        for point, mounted in reached or tops:
            below = path.relative_to(mounted) if reached else PurePosixPath()
            top = root / point.relative_to("/")
            for part in (below, *below.parents):
                yield top / part, _V1 if kind == "cgroup" else _V2


def _mounts(proc: Path) -> Iterator[tuple[str, PurePosixPath, PurePosixPath]]:
    """Yield type, root within the file system, and mount point, of mounts that limit memory."""
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kinds) < 3 or not fields[4].startswith("/"):
            continue
        memory = kinds[0] == "cgroup" and "memory" in kinds[2].split(",")
        if memory or kinds[0] == "cgroup2":
            yield kinds[0], PurePosixPath(_plain(fields[3])), PurePosixPath(_plain(fields[4]))


def _plain(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _process_free(proc: Path) -> Iterator[int]:
    """Yield what is left below the limits of the process itself."""
    limits, status = _text(proc / "limits"), _text(proc / "status")
    for limit, size in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        allowed = re.search(rf"^{limit} +(\d+) ", limits, re.MULTILINE)  # the soft one
        taken = re.search(rf"^{size}:\s+(\d+) kB$", status, re.MULTILINE)
        if allowed:
            yield int(allowed[1]) - (int(taken[1]) << 10 if taken else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text) else None
