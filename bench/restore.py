"""How fast does a checkpoint come back?

One state of fp32 tensors with the shapes of a Transformer is saved in every way, and read back in
every way, *cold* (from the disk) and *warm* (from the page cache).

How it is measured. All rows in one process, in rounds; every round has each row once cold and once
warm, in an order that is drawn anew, so drift of the machine hits all alike. Before a cold reading,
outside the measured time, the row's files are synced and dropped from the page cache, and
mincore(2) must find none of their pages there; before a warm one they are read once. The first
round is not counted. After each reading, also outside the time, the tensors are compared with what
was saved.

How to read it. GB/s are bytes of tensors (not of files) by seconds: the median, and under it the
smallest and the largest value.

    new memory       the tensors are new: taking memory from the system is part of the time
    existing tensors the values come into tensors that are there, as a training loop has them
    checked          what is known of the bytes when the call returns

`asyncsave.restore` changes nothing before every byte was checked. What is not in the page cache as
plain bytes it holds meanwhile, in up to half of the available memory.

The values are normal with a standard deviation of 0.02, as weights of language models are before
training. What compresses is their exponents.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Spread, provenance, start, where, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import asyncsave

safetensors: Any = None
if importlib.util.find_spec("safetensors") is not None:
    safetensors = importlib.import_module("safetensors.torch")

State = dict[str, torch.Tensor]

LAYERS, WIDTH = 21, 1024  # with embeddings, 1 GiB and what norms and biases add
QUICK = {"layers": 2, "width": 128, "rounds": 2}
ROUNDS = 7
NOTHING, STORED, BOTH = "nothing", "stored and decoded bytes", "all bytes, before any is changed"
NEW, EXISTING = "new memory", "existing tensors"


def make_state(layers: int, width: int) -> State:
    """Return weights as they are before training."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (4 * width, width)}
    for i in range(layers):
        for name, rows, columns in (
            ("qkv", 3 * width, width),
            ("out", width, width),
            ("up", 4 * width, width),
            ("down", width, 4 * width),
        ):
            shapes[f"{i}.{name}.weight"] = rows, columns
            shapes[f"{i}.{name}.bias"] = (rows,)
        shapes[f"{i}.norm"] = (width,)
    return {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}


@dataclass(slots=True)
class Row:
    """A way of reading.

    Attributes:
        path: its file or directory.
        where: NEW or EXISTING.
        checked: what it checks.
        read: reads; returns the tensors.
        why: why there are no figures.
        seconds: all that was measured, "cold" and "warm".
    """

    name: str
    path: Path
    where: str
    checked: str
    read: Callable[[], State | None]
    why: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cold": [], "warm": []})


def save_all(directory: Path, state: State) -> None:
    """Save the state in every way."""
    torch.save(state, directory / "torch.pt")
    if safetensors is not None:
        safetensors.save_file(state, directory / "safetensors")
    dcp_save(state, checkpoint_id=directory / "dcp")
    asyncsave.save(state, directory / "off", compression="off").result()
    asyncsave.save(state, directory / "level1", compression=1).result()


def rows(directory: Path, into: State) -> list[Row]:
    """Return all rows; those for existing tensors fill ``into``."""
    file, tensors, off, level1 = (
        directory / name for name in ("torch.pt", "safetensors", "off", "level1")
    )

    def clone(state: State) -> State:
        return {name: tensor.clone() for name, tensor in state.items()}

    def copy() -> State:
        for name, tensor in torch.load(file).items():
            into[name].copy_(tensor)
        return into

    def distributed() -> State:
        dcp_load(into, checkpoint_id=directory / "dcp")
        return into

    def restore(path: Path) -> State:
        asyncsave.restore(path, into)
        return into

    def verify(path: Path) -> None:
        asyncsave.verify(path)

    def mapped() -> State:
        return clone(torch.load(file, mmap=True))

    found = [
        Row("torch.load", file, NEW, NOTHING, lambda: torch.load(file)),
        Row("torch.load(mmap=True) + clone", file, NEW, NOTHING, mapped),
        Row(
            "safetensors load_file + clone",
            tensors,
            NEW,
            NOTHING,
            lambda: clone(safetensors.load_file(tensors)),
        ),
        Row("asyncsave.load, off", off, NEW, STORED, lambda: asyncsave.load(off)),
        Row("asyncsave.load, level 1", level1, NEW, STORED, lambda: asyncsave.load(level1)),
        Row("torch.load + copy_", file, EXISTING, NOTHING, copy),
        Row("dcp.load", directory / "dcp", EXISTING, NOTHING, distributed),
        Row("asyncsave.restore, off", off, EXISTING, BOTH, lambda: restore(off)),
        Row("asyncsave.restore, level 1", level1, EXISTING, BOTH, lambda: restore(level1)),
        Row("asyncsave.verify, off", off, "–", STORED, lambda: verify(off)),
        Row("asyncsave.verify, level 1", level1, "–", STORED, lambda: verify(level1)),
    ]
    for row in found:
        if row.path == tensors and safetensors is None:
            row.why = "safetensors is not installed"
    return found


# -- the page cache ---------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    """Return the files of a checkpoint."""
    return [each for each in (path, *path.rglob("*")) if each.is_file()]


def drop(path: Path) -> None:
    """Put a checkpoint out of the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    left = sum(resident_pages(file) for file in files_of(path))
    if left:
        raise RuntimeError(f"{left} pages of {path.name} stay in the page cache")


def warm(path: Path) -> None:
    """Put a checkpoint into the page cache."""
    buffer = bytearray(1 << 20)
    for file in files_of(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident_pages(file: Path) -> int:
    """Return how many pages of a file are in the page cache."""
    length = file.stat().st_size
    if not length:
        return 0
    with open(file, "rb") as opened:
        mapping = np.frombuffer(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    if ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(mapping.ctypes.data),
        ctypes.c_size_t(length),
        ctypes.c_void_p(pages.ctypes.data),
    ):
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(pages & 1))


# -- measuring --------------------------------------------------------------------------------


def measure(row: Row, temperature: str, state: State, into: State) -> float:
    """Return the seconds of one reading."""
    for tensor in into.values():
        tensor.zero_()
    gc.collect()
    # a restore happens once, so its memory is not what an earlier one has left to the allocator
    ctypes.CDLL(None).malloc_trim(0)
    if temperature == "cold":
        drop(row.path)
    else:
        warm(row.path)
    began = time.perf_counter()
    result = row.read()
    seconds = time.perf_counter() - began
    if result is not None and not all(torch.equal(result[name], state[name]) for name in state):
        raise AssertionError(f"{row.name} returned other values than were saved")
    return seconds


def run(found: list[Row], state: State, into: State, rounds: int, log: Console) -> None:
    """Measure all rounds, and one before them that is not counted."""
    order = random.Random(0)
    for round_ in range(rounds + 1):
        turns = [(row, temperature) for row in found for temperature in row.seconds]
        for row, temperature in order.sample(turns, len(turns)):
            if row.why is not None:
                continue
            try:
                seconds = measure(row, temperature, state, into)
            except Exception as error:
                row.why = f"{type(error).__name__}: {error}"
                log.print(escape(f"{round_}/{rounds} {row.name}: {row.why}"))
                continue
            if round_:
                row.seconds[temperature].append(seconds)
        log.print(f"{round_}/{rounds} done")


def bars(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what asyncsave.restore is held to, by medians, and what came out."""

    def speed(name: str, temperature: str) -> float | None:
        found = figures[name][temperature]
        return None if found is None else float(found["median"])

    result = []
    for name, temperature, factor, other in (
        ("asyncsave.restore, off", "cold", 1.2, "torch.load"),
        ("asyncsave.restore, off", "warm", 1.0, "torch.load(mmap=True) + clone"),
        ("asyncsave.restore, level 1", "cold", 1.0, "torch.load"),
    ):
        mine, theirs = speed(name, temperature), speed(other, temperature)
        known = mine is not None and theirs is not None
        result.append(
            {
                "bar": f"{name}, {temperature} ≥ {factor:g} × {other}",
                "factor": factor,
                "measured": mine / theirs if known else None,  # type: ignore[operator]
                "met": known and mine >= factor * theirs,  # type: ignore[operator]
            }
        )
    return result


def summarize(row: Row, state_bytes: int) -> dict[str, Any]:
    """Return the row's figures, in GB/s."""
    return {
        "name": row.name,
        "where": row.where,
        "checked": row.checked,
        "why": row.why,
        "stored_bytes": sum(file.stat().st_size for file in files_of(row.path)),
        **{
            temperature: asdict(Spread.of(state_bytes / 1e9 / each for each in seconds))
            if seconds and row.why is None
            else None
            for temperature, seconds in row.seconds.items()
        },
        "seconds": row.seconds,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table and the bars."""
    table = Table(
        title="How fast does a checkpoint come back?",
        caption=(
            f"{results['state_bytes'] / 2**30:.2f} GiB of fp32, normal with σ = 0.02; "
            f"{results['settings']['rounds']} rounds; median, and smallest … largest\n"
            f"{where(results)}"
        ),
    )
    for name in ("", "into"):
        table.add_column(name)
    for name in ("cold GB/s", "warm GB/s", "stored GB"):
        table.add_column(name, justify="right")
    table.add_column("checked")
    for row in results["rows"]:
        cells = [Spread(**row[t]).show() if row[t] else "–" for t in ("cold", "warm")]
        stored = f"{row['stored_bytes'] / 1e9:.3f}"
        table.add_row(escape(row["name"]), row["where"], *cells, stored, row["checked"])
    console.print(table)
    for row in results["rows"]:
        if row["why"] is not None:
            console.print(escape(f"{row['name']}: {row['why']}"))
    verdict = Table("bar", "measured", "met", title="What asyncsave.restore is held to")
    for bar in results["bars"]:
        measured = "–" if bar["measured"] is None else f"{bar['measured']:.2f} ×"
        verdict.add_row(escape(bar["bar"]), measured, "yes" if bar["met"] else "no")
    console.print(verdict)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, help=f"default: {LAYERS}")
    parser.add_argument("--width", type=int, help=f"default: {WIDTH}")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/restore.json")
    parser.add_argument("--quick", action="store_true", help="a few MiB: does it run at all")
    options = parser.parse_args(arguments)
    defaults = {"layers": LAYERS, "width": WIDTH, "rounds": ROUNDS}
    for name, value in (defaults | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.json is None and not options.quick:
        options.json = RESULTS / "restore.json"
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    console, log = start(150)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance("cpu", directory)
        log.print(f"asyncsave {asyncsave.__version__}, checkpoints on {about['filesystem']}")
        state = make_state(options.layers, options.width)
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        state_bytes = sum(tensor.nbytes for tensor in state.values())
        save_all(directory, state)
        found = rows(directory, into)
        run(found, state, into, options.rounds, log)
        summaries = [summarize(row, state_bytes) for row in found]
    results = {
        "benchmark": "restore",
        "question": "How fast does a checkpoint come back?",
        **about,
        "settings": {name: getattr(options, name) for name in ("layers", "width", "rounds")},
        "state_bytes": state_bytes,
        "run_seconds": time.perf_counter() - began,
        "rows": summaries,
        "bars": bars({row["name"]: row for row in summaries}),
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
