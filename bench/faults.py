"""What becomes of a flipped bit, and of a full disk?

The same state is saved by each way. Then one bit of a tensor in its largest file is flipped, and
it is loaded; and it is saved to a filesystem too small for it: a tmpfs of a few MiB, which only
root can mount, otherwise that column says so. Each is tried in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp_module
from common import RESULTS, provenance, write_json
from rich.console import Console
from rich.table import Table

import asyncsave

TENSORS, LENGTH = 8, 1 << 18  # 8 MiB
SMALL_BYTES = 5 << 20
NAMES = {
    "torch": "torch.save, torch.load",
    "dcp": "dcp.save, dcp.load (4 threads)",
    "asyncsave": "asyncsave.save, asyncsave.load",
}

State = dict[str, torch.Tensor]
dcp: Any = dcp_module


def state() -> State:
    """Return what is saved: the same each time."""
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(LENGTH, generator=generator) for i in range(TENSORS)}


def save(way: str, path: Path) -> None:
    """Save the state."""
    if way == "torch":
        torch.save(state(), path)
    elif way == "dcp":
        dcp.save(state(), storage_writer=dcp.FileSystemWriter(path, thread_count=4))
    else:
        asyncsave.save(state(), path).result()


def load(way: str, path: Path) -> State:
    """Load it."""
    loaded: Any
    if way == "torch":
        loaded = torch.load(path, weights_only=True)
    elif way == "dcp":
        loaded = {name: torch.zeros_like(value) for name, value in state().items()}
        dcp.load(loaded, checkpoint_id=path)
    else:
        loaded = asyncsave.load(path)
    return loaded  # type: ignore[no-any-return]


def same(loaded: State) -> bool:
    """Whether every bit is what was saved."""
    wanted = state()
    pairs = ((loaded[name], wanted[name]) for name in wanted)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def told(job: Callable[[], str]) -> str:
    """Return what a job comes to, or what it raises."""
    try:
        return job()
    except BaseException as error:  # DCP's own is not an Exception
        return f"raises {type(error).__name__}"


def flipped(way: str, directory: Path) -> str:
    """Say what loading does with a flipped bit."""
    path = directory / "saved"
    save(way, path)
    files = [path] if path.is_file() else list(path.iterdir())
    file = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + LENGTH] ^= 1  # a quarter into a tensor, which begins about in the middle
    file.write_bytes(data)

    def job() -> str:
        return "loads, unchanged" if same(load(way, path)) else "loads a wrong value silently"

    return told(job)


def full(way: str, directory: Path) -> str:
    """Say what saving does where there is no space, and what is there then."""
    path = directory / "saved"

    def job() -> str:
        save(way, path)
        return "save reports success"

    saved = told(job)
    if way == "asyncsave":
        left = "nothing is left" if not list(directory.iterdir()) else "leftovers"
        return f"{saved}, {left}"
    if not path.exists():
        return f"{saved}, nothing is left"
    what = told(lambda: "loads" if same(load(way, path)) else "loads a wrong value silently")
    return f"{saved}; what is there then {what}"


@contextlib.contextmanager
def small_filesystem(directory: Path) -> Iterator[Path | None]:
    """Mount a filesystem that is too small; None where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield directory if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def child(what: str, way: str, directory: Path) -> str:
    """Try one thing in a process of its own."""
    command = [sys.executable, __file__, "--child", what, way, str(directory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return f"ends with status {ran.returncode}"
    return str(json.loads(ran.stdout.splitlines()[-1]))


def main(arguments: list[str]) -> int:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="default: bench/results/faults.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="writes no file by itself")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        warnings.simplefilter("ignore")
        what, way, directory = options.child
        print(json.dumps({"flipped": flipped, "full": full}[what](way, Path(directory))))
        return 0
    if options.json is None and not options.quick:
        options.json = RESULTS / "faults.json"
    rows = []
    for way, name in NAMES.items():
        with tempfile.TemporaryDirectory() as directory:
            flip = child("flipped", way, Path(directory))
        with (
            tempfile.TemporaryDirectory() as directory,
            small_filesystem(Path(directory)) as small,
        ):
            space = "not tried: needs root" if small is None else child("full", way, small)
        rows.append({"way": name, "flipped_bit": flip, "full_disk": space})
    results = {
        "benchmark": "faults",
        "question": "What becomes of a flipped bit, and of a full disk?",
        **provenance("cpu", Path(tempfile.gettempdir())),
        "rows": rows,
    }
    if options.json is not None:
        write_json(options.json, results)
    table = Table("", "one flipped bit", "a full disk", title="What becomes of a fault?")
    for row in rows:
        table.add_row(row["way"], row["flipped_bit"], row["full_disk"])
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
