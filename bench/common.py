"""What benchmarks share: the machine in words, medians with their spread, peak memory, JSON."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import asyncsave

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the range it is from."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def show(self, digits: int = 2, scale: float = 1.0) -> str:
        """Return the median, and under it the range, in rich's markup."""
        median, low, high = (f"{x / scale:.{digits}f}" for x in (self.median, self.min, self.max))
        return f"{median}\n[dim]{low} … {high}[/dim]"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be, what it is, and whether that will do; None: it was not measured."""

    bar: str
    measured: str
    met: bool | None

    @classmethod
    def of(cls, what: str, measured: float | None, limit: float, *, at_least: bool = False) -> Bar:
        """Return the bar that ``measured`` is at most ``limit``, or at least."""
        bar = f"{what} {'≥' if at_least else '≤'} {limit:g}"
        if measured is None:
            return cls(bar, "–", None)
        met = measured >= limit if at_least else measured <= limit
        return cls(bar, f"{measured:.4g}", met)


def start(width: int) -> tuple[Console, Console]:
    """Prepare the process of a benchmark; return where results go, and where progress goes.

    SIGTERM ends it as Ctrl+C does, so that no temporary checkpoint stays. Tables are ``width``
    columns wide where there is no terminal.
    """
    # what DCP says on every save of a single process
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    return console, Console(stderr=True, highlight=False)


def run_child(script: str, options: argparse.Namespace, names: Iterable[str], *more: str) -> Any:
    """Run ``script`` in a process of its own with these options; return the JSON that it prints."""
    command = [sys.executable, script, *more]
    for name in names:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(more)}:\n{ran.stderr}")
    return json.loads(ran.stdout)


def where(results: dict[str, Any]) -> str:
    """Return the machine that results are from, in one line."""
    machine = results["hardware"]
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {results['filesystem']}, "
        f"torch {results['versions']['torch']}"
    )


def ratio(one: float | None, other: float | None) -> float | None:
    """Return the ratio of two measured times; None of one that is less than nothing, by noise."""
    return None if one is None or other is None or other <= 0 else one / other


def show_bars(bars: Iterable[Bar], console: Console) -> None:
    """Print the bars as a small table."""
    table = Table()
    for name in ("bar", "measured", "met"):
        table.add_column(name)
    for bar in bars:
        met = {True: "yes", False: "[bold]no[/bold]", None: "not measured"}[bar.met]
        table.add_row(bar.bar, bar.measured, met)
    console.print(table)


class PeakMemory:
    """Samples resident memory in a thread, from entering to leaving: this process's, and what its
    children have beside what they share.

    Attributes:
        before: bytes on entering.
        peak: most bytes of any sample.
    """

    def __init__(self, every_seconds: float = 0.02) -> None:
        self._every_seconds = every_seconds
        self._process = psutil.Process()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self.now()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """Return the resident bytes."""
        resident = int(self._process.memory_info().rss)
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                memory = child.memory_info()
                resident += memory.rss - memory.shared
        return resident

    def _sample(self) -> None:
        while not self._over.wait(self._every_seconds):
            self.peak = max(self.peak, self.now())


def hardware(device: str) -> dict[str, Any]:
    """Return the CPU's model, usable cores, memory and, for "cuda", the GPU's name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def filesystem(path: Path) -> str:
    """Return the type of the filesystem ``path`` is on."""
    parents = {str(parent) for parent in (path.resolve(), *path.resolve().parents)}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint in parents]
    if not mounts:
        return "unknown"
    longest = max(len(mount.mountpoint) for mount in mounts)
    return [mount.fstype for mount in mounts if len(mount.mountpoint) == longest][-1]


def provenance(device: str, directory: Path) -> dict[str, Any]:
    """Return what a reader needs to know about where figures are from."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "commit": _commit(),
        "versions": {
            "asyncsave": asyncsave.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "hardware": hardware(device),
        "filesystem": filesystem(directory),
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write ``results``; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def _commit() -> str | None:
    """Return the commit of this repository, "+changes" if files differ from it; None outside."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "-uno") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
