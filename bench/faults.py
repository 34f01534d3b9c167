"""What becomes of a flipped bit, and of a full disk?

The same state is saved by each way. Then one bit of a tensor in its largest file is flipped, and
it is loaded; and it is saved to a filesystem too small for it: a tmpfs of a few MiB, which only
root can mount, otherwise that column says so. Each is tried in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch
from harness import Bar, Bench, Column, Results, table
from loads import DCP, LOAD_OFF, TORCH, Tensors, loads, save_dcp
from rich.table import Table

import asyncsave

TENSORS, LENGTH = 8, 1 << 18  # 8 MiB
SMALL_BYTES = 5 << 20
WAYS: dict[str, tuple[str, Callable[[Tensors, Path], object], str]] = {
    "torch": ("torch.save, torch.load", torch.save, TORCH),
    "dcp": ("dcp.save, dcp.load (4 threads)", partial(save_dcp, threads=4), DCP),
    "asyncsave": (
        "asyncsave.save, asyncsave.load",
        lambda state, path: asyncsave.save(state, path).result(),
        LOAD_OFF,
    ),
}
"""For each way its row, how it saves, and how it loads, a name of loads.py."""


def state() -> Tensors:
    """Return what is saved: the same each time."""
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(LENGTH, generator=generator) for i in range(TENSORS)}


def save(way: str, path: Path) -> None:
    """Save the state."""
    WAYS[way][1](state(), path)


def load(way: str, path: Path) -> Tensors:
    """Load it."""
    (read,) = (each.read for each in loads() if each.name == WAYS[way][2])
    found = read(path, {name: torch.zeros_like(value) for name, value in state().items()})
    assert found is not None
    return found


def same(loaded: Tensors) -> bool:
    """Whether every bit is what was saved."""
    pairs = ((loaded[name], value) for name, value in state().items())
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def told(job: Callable[[], str]) -> str:
    """Return what a job comes to, or what it raises; threads that fail beside it say nothing."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return job()
    except BaseException as error:  # DCP's own is not an Exception
        return f"raises {type(error).__name__}"


def flipped(way: str, path: Path) -> str:
    """Say what loading does with a flipped bit."""
    save(way, path)
    files = [path] if path.is_file() else list(path.iterdir())
    file = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + LENGTH] ^= 1  # a quarter into a tensor, which begins about in the middle
    file.write_bytes(data)
    wrong = "loads a wrong value silently"
    return told(lambda: "loads, unchanged" if same(load(way, path)) else wrong)


def full(way: str, path: Path) -> str:
    """Say what saving does where there is no space, and what is there then."""

    def job() -> str:
        save(way, path)
        return "save reports success"

    saved = told(job)
    if way == "asyncsave":
        left = "nothing is left" if not list(path.parent.iterdir()) else "leftovers"
        return f"{saved}, {left}"
    if not path.exists():
        return f"{saved}, nothing is left"
    what = told(lambda: "loads" if same(load(way, path)) else "loads a wrong value silently")
    return f"{saved}; what is there then {what}"


@contextlib.contextmanager
def small_filesystem(directory: Path) -> Iterator[bool]:
    """Mount a filesystem that is too small; False where that is not allowed."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


class Faults(Bench):
    name = "faults"
    question = "What becomes of a flipped bit, and of a full disk?"

    def measure(self) -> Results:
        rows = []
        for way, (name, *_) in WAYS.items():
            bit = self._try(flipped, way, self.directory / way)
            with small_filesystem(self.directory / f"{way}-small") as mounted:
                place = self.directory / f"{way}-small" / "saved"
                space = self._try(full, way, place) if mounted else "not tried: needs root"
            self.say(f"{name}: {bit}; {space}")
            rows.append({"way": name, "flipped_bit": bit, "full_disk": space})
        return {"rows": rows}

    def _try(self, what: Callable[[str, Path], str], way: str, path: Path) -> str:
        try:
            return self.apart(what, way, path)
        except BrokenProcessPool:
            return "ends the process"

    def bars(self, results: Results) -> list[Bar]:
        bit = results["rows"][-1]["flipped_bit"]
        return [Bar("asyncsave notices a flipped bit", bit, bit == "raises IntegrityError")]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "": "way",
            "one flipped bit": "flipped_bit",
            "a full disk": "full_disk",
        }
        yield table(results, "What becomes of a fault?", columns, "8 MiB in 8 tensors")


if __name__ == "__main__":
    sys.exit(Faults().main(sys.argv[1:]))
