"""The machine: what a reader of figures must know of it, and how much of its memory is taken."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import asyncsave

ROOT = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class Peak:
    """Resident bytes: ``before``, and the most that were seen since."""

    before: int
    most: int


def resident_bytes() -> int:
    """Return this process's resident bytes, and what its children have beside what they share."""
    process = psutil.Process()
    resident = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            memory = child.memory_info()
            resident += memory.rss - memory.shared
    return resident


@contextlib.contextmanager
def peak_memory(every_seconds: float = 0.02) -> Iterator[Peak]:
    """Sample `resident_bytes` in a thread, from entering to leaving."""
    before = resident_bytes()
    peak, over = Peak(before, before), threading.Event()

    def sample() -> None:
        while not over.wait(every_seconds):
            peak.most = max(peak.most, resident_bytes())

    thread = threading.Thread(target=sample, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.most = max(peak.most, resident_bytes())


def provenance(command: Sequence[str], device: str, directory: Path) -> dict[str, Any]:
    """Return what a reader needs to know about where figures are from."""
    from asyncsave.codec import kernel  # not before: knobs.py imports the codec in its own way

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": _commit(),
        "versions": {
            "asyncsave": asyncsave.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "byte planes": kernel.NAME,
            "system": f"{platform.system()} {platform.release()}",
        },
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "filesystem": filesystem(directory),
    }


def filesystem(path: Path) -> str:
    """Return the type of the filesystem ``path`` is on."""
    types = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    places = (str(place) for place in (path.resolve(), *path.resolve().parents))
    return next((types[place] for place in places if place in types), "unknown")


def _cpu() -> str:
    """Return the CPU's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of this repository, "+changes" if files differ from it; None outside."""
    head, changes = (
        subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    )
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout else "")
